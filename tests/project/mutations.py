"""Break lines of `vsgd/` chosen at random, one at a time, and print which ones the tests notice.

    python tests/project/mutations.py --seed 0 --lines 10 -- -m "not slow" tests/core tests/contract

What follows `--` goes to pytest, which stops at the first failure. It exits with the number of lines that no test noticed.
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


class Mutation(NamedTuple):
    """One change of a line.

    Attributes:
        path: the module, from the root.
        line: its number, from 1.
        text: the line as changed.
    """

    path: Path
    line: int
    text: str


def _change(node: ast.AST) -> str | None:
    """Return the node's source with another operator or constant, or None if it has none."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPS:
            node.op = _SWAPS[type(op)]()
        case ast.Compare(ops=[op]):
            node.ops = [_SWAPS[type(op)]()]
        case ast.UnaryOp(op=ast.Not()):
            return ast.unparse(node.operand)
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value += 1
        case _:
            return None
    return ast.unparse(node) if isinstance(node, ast.Constant) else f"({ast.unparse(node)})"


def _list_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes whose change breaks something: not annotations, nor `strict` of `zip`, which itself only checks."""
    for field, value in ast.iter_fields(tree):
        if field not in ("annotation", "returns"):
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.AST) and getattr(node, "arg", None) != "strict":
                    yield node
                    yield from _list_code(node)


def list_mutations(path: Path) -> dict[int, list[Mutation]]:
    """Return the changes of each line of a module that can be changed within the line."""
    source = (ROOT / path).read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[int, list[Mutation]] = {}
    for node in _list_code(ast.parse(source)):
        if not isinstance(node, ast.expr) or node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        changed = _change(node)
        if changed is not None and line.isascii():  # the offsets are in bytes
            text = line[: node.col_offset] + changed + line[node.end_col_offset :]
            found.setdefault(node.lineno, []).append(Mutation(path, node.lineno, text))
    return found


def choose_mutations(seed: int, count: int) -> list[Mutation]:
    """Choose a change of `count` lines, each line of `vsgd/` as likely as another."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / "vsgd").rglob("*.py"))
    lines = [mutations for path in paths for mutations in list_mutations(path).values()]
    rng = random.Random(seed)
    return [rng.choice(mutations) for mutations in rng.sample(lines, count)]


def find_failure(mutation: Mutation, arguments: list[str]) -> str | None:
    """Return the first failure that pytest reports in a copy of the repository with the change, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*_cache", ".git", ".tox", ".venv", "__pycache__", "build"))
        lines = (copy / mutation.path).read_text(encoding="utf-8").splitlines()
        lines[mutation.line - 1] = mutation.text
        (copy / mutation.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(copy)}  # before an installed vsgd
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
        failure = find_failure(mutation, options.pytest)
        unnoticed += failure is None
        print(f"{mutation.path}:{mutation.line}: {mutation.text.strip()}")
        print(f"    {failure or 'NOT NOTICED'} ({time.perf_counter() - start:.0f} s)", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
