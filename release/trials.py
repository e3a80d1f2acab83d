"""Installs what was built as its users will, and tries it out: `python -m release.trials dist`.

Each extra of the wheel and of the sdist gets an environment of its own, one at a time, for with PyTorch it takes a gigabyte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple


class Trial(NamedTuple):
    """What must work with one extra, and nothing else, installed.

    Attributes:
        adapters: those that `release/smoke.py` is to step.
        tests: of the sdist, to be run after that.
        keras_backend: what the user brings to Keras.
    """

    adapters: tuple[str, ...]
    tests: tuple[str, ...] = ()
    keras_backend: str | None = None


#: By extra; "" is none.
TRIALS = {
    "": Trial(("numpy",), tests=("tests",)),
    "torch": Trial(("numpy", "torch")),
    "fused": Trial(("torch", "torch-fused")),
    "optax": Trial(("optax",)),
    "mlx": Trial(("mlx",)),
    "keras": Trial(("keras",), keras_backend="jax"),
    "notebooks": Trial(("numpy",), tests=("tests/test_notebooks.py",)),
    "examples": Trial(("torch-fused",), tests=("tests/test_quickstart.py",)),
    "experiments": Trial(("torch-fused", "keras"), tests=("tests/experiments/test_tasks.py",), keras_backend="torch"),
}


def check_contents(wheel: Path, source: Path) -> None:
    """That a wheel has the package's files, its metadata, and nothing else.

    Args:
        wheel: the file.
        source: the unpacked sdist.

    Raises:
        ValueError: it has others.
    """
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(source).as_posix() for path in (source / "vsgd").rglob("*") if path.is_file()}
    if packed != there:
        raise ValueError(f"{wheel.name} and the sdist differ in {', '.join(sorted(packed ^ there))}")


def unpacked(sdist: Path, folder: Path) -> Path:
    """The folder of the unpacked sdist.

    Args:
        sdist: the file.
        folder: where it is to be unpacked.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def try_out(artifact: Path, extra: str, version: str, source: Path) -> None:
    """Install an artifact with one extra into a new environment, and do what its trial says.

    Args:
        artifact: a wheel or an sdist.
        extra: of `TRIALS`.
        version: the artifact's.
        source: the unpacked sdist, where the commands run.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    trial = TRIALS[extra]
    brought = [trial.keras_backend] if trial.keras_backend else []
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if trial.keras_backend:
        variables["KERAS_BACKEND"] = trial.keras_backend
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = os.path.join(sysconfig.get_path("scripts", "venv", {"base": folder}), "python")

        def run(*arguments: str) -> None:
            # -P, lest the sdist's own package is imported instead of what is installed.
            subprocess.run([python, "-P", *arguments], cwd=source, env=variables, check=True)

        def install(*extras: str) -> None:
            wanted = f"vsgd[{','.join(filter(None, extras))}] @ {artifact.resolve().as_uri()}"
            run("-m", "pip", "install", "--quiet", "--no-compile", wanted, *brought)

        install(extra)
        run("release/smoke.py", version, *trial.adapters)
        if trial.tests:
            install(extra, "tests")
            run("-m", "pytest", "--quiet", *trial.tests)


def main(dist: Path) -> None:
    """Try out the wheel and the sdist with each extra.

    Args:
        dist: the folder with one of each.

    Raises:
        ValueError: the wheel has not the files that it should.
        subprocess.CalledProcessError: something does not work.
    """
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        source = unpacked(sdist, Path(folder))
        check_contents(wheel, source)
        for artifact in (wheel, sdist):
            for extra in TRIALS:
                print(f"\n{artifact.name}, {extra or 'no extra'}", flush=True)
                try_out(artifact, extra, version, source)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
