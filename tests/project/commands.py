"""Look up the names in a page's shell commands, because running the commands takes too long."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("python", "pip", "tox", "torchrun")


def absent(script: str) -> list[str]:
    """Return the names in a script's commands that do not exist: programs, modules, files, options, extras, tox environments.

    Example:
        >>> absent("pip install 'vsgd[torch]' && python -m benchmarks report --page docs/performance.md")
        []
        >>> absent("python examples/quickstart.py --step 3")
        ['--step']
    """
    lines = script.replace("\\\n", " ").splitlines()
    commands = [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]
    run = [list(itertools.dropwhile(_sets_variables, words)) for words in commands]
    return [name for words in run if words for name in _absent(words)]


def _sets_variables(word: str) -> bool:
    return re.match(r"export$|[A-Z_]+=", word) is not None


def _absent(words: Iterable[str]) -> Iterator[str]:
    program, *arguments = words
    if arguments[:2] in (["-m", "pip"], ["-m", "tox"]):
        program, *arguments = arguments[1:]
    program = Path(program).name.rstrip("3")
    yield from (word for word in arguments if re.fullmatch(r"[\w-]+(/[\w.-]+)+", word) and not (ROOT / word).exists())
    if program == "pip":
        yield from _absent_extras(arguments)
    elif program == "tox":
        yield from _absent_environments(arguments)
    elif program == "python" and arguments[0] == "-m":
        yield from _absent_from_module(*arguments[1:])
    elif program in ("python", "torchrun"):
        yield from _absent_from_script(arguments)
    else:
        yield program


def _absent_extras(words: Iterable[str]) -> Iterator[str]:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = (match[1].split(",") for match in map(re.compile(r"(?:vsgd|\.)\[(.+)\]").fullmatch, words) if match)
    return (extra for extras in asked for extra in extras if extra not in known)


def _absent_environments(words: Sequence[str]) -> Iterator[str]:
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    known = {name for section in tox.sections() for name in _expanded(section.removeprefix("testenv:"))}
    asked = (value for option, value in itertools.pairwise(words) if option == "-e")
    return (name for value in asked for name in value.split(",") if name not in known)


def _expanded(section: str) -> Iterator[str]:
    """Return the names that `a-{b,c}` expands to."""
    return map("".join, itertools.product(*(part.split(",") for part in re.split(r"[{}]", section))))


def _absent_from_module(name: str, *arguments: str) -> Iterator[str]:
    folder = ROOT.joinpath(*name.split("."))
    ours = [file for file in (*folder.glob("*.py"), folder.with_suffix(".py")) if file.is_file()]
    if ours:
        yield from _absent_options(ours, arguments)
    elif find_spec(name) is None:
        yield name


def _absent_from_script(words: Sequence[str]) -> Iterator[str]:
    """Return the missing options after the script; those before it belong to the program that runs the script."""
    script, *arguments = itertools.dropwhile(lambda word: not word.endswith(".py"), words)
    return _absent_options([ROOT / script], arguments)


def _absent_options(files: Iterable[Path], arguments: Iterable[str]) -> Iterator[str]:
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return (each for each in arguments if each.startswith("--") and f'"{each}"' not in source)
