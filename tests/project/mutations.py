"""Break lines of `vsgd/` chosen at random, one at a time, and print which ones the tests notice.

    python tests/project/mutations.py --seed 0 --lines 10 -- -m "not slow" tests/core tests/contract

The arguments after `--` go to pytest, which stops at the first failure. The script exits with the number of lines that no test
noticed.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


def _change(node: ast.AST) -> bool:
    """Give the node another operator or constant, if it has one."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPS:
            node.op = _SWAPS[type(op)]()
        case ast.Compare(ops=[op]):
            node.ops = [_SWAPS[type(op)]()]
        case ast.UnaryOp(op=ast.Not()):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value += 1
        case _:
            return False
    return True


def _list_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes whose change breaks something: not annotations, nor `strict` of `zip`, which itself only checks."""
    for field, value in ast.iter_fields(tree):
        if field not in ("annotation", "returns"):
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.AST) and getattr(node, "arg", None) != "strict":
                    yield node
                    yield from _list_code(node)


class Mutation(NamedTuple):
    """One change of a line.

    Attributes:
        path: the module, relative to the root.
        number: the index of the changed node.
    """

    path: Path
    number: int

    def apply(self) -> tuple[str, str]:
        """Return a description of the change, with its place, and the changed source."""
        tree = ast.parse((ROOT / self.path).read_text(encoding="utf-8"))
        node = list(_list_code(tree))[self.number]
        _change(node)
        return f"{self.path}:{node.lineno}: {ast.unparse(node)}", ast.unparse(tree)


def choose_mutations(seed: int, count: int) -> list[Mutation]:
    """Choose a change of `count` lines, where each line of `vsgd/` is equally likely."""
    lines: dict[tuple[Path, int], list[Mutation]] = {}
    for path in sorted((ROOT / "vsgd").rglob("*.py")):
        for number, node in enumerate(list(_list_code(ast.parse(path.read_text(encoding="utf-8"))))):
            if isinstance(node, ast.expr) and _change(node):
                lines.setdefault((path, node.lineno), []).append(Mutation(path.relative_to(ROOT), number))
    rng = random.Random(seed)
    return [rng.choice(mutations) for mutations in rng.sample(list(lines.values()), count)]


def find_failure(path: Path, source: str, arguments: list[str]) -> str | None:
    """Return the first failure that pytest reports in a copy of the repository with this source of a module, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*_cache", ".git", ".tox", ".venv", "__pycache__", "build"))
        (copy / path).write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(copy)}  # takes precedence over an installed vsgd
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=10, help="how many to break")
    parser.add_argument("pytest", nargs="*", help="its arguments")
    options = parser.parse_args()
    unnoticed = 0
    for mutation in choose_mutations(options.seed, options.lines):
        start = time.perf_counter()
        what, source = mutation.apply()
        failure = find_failure(mutation.path, source, options.pytest)
        unnoticed += failure is None
        print(what)
        print(f"    {failure or 'NOT NOTICED'} ({time.perf_counter() - start:.0f} s)", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
