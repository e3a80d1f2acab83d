"""Test that data sets are read in their published formats and checked, and that missing ones raise a clear error."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from research import paper_archives

from experiments import datasets


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # the plain unpickler accepts NumPy's old name
def test_cifar100_is_read_as_its_page_says(tmp_path: Path) -> None:
    path = paper_archives.cifar100(tmp_path)
    found = datasets.find_archive("cifar100", tmp_path)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    images = found.read()
    with tarfile.open(path) as tar:
        parts = [pickle.load(tar.extractfile(f"cifar-100-python/{part}"), encoding="bytes") for part in ("train", "test")]
    for batch, x, y in zip(parts, (images.train_x, images.test_x), (images.train_y, images.test_y), strict=True):
        assert y.tolist() == batch[b"fine_labels"]
        assert x.dtype == np.uint8
        # "The first 1024 entries contain the red channel values, ... in row-major order."
        for image, row, column, channel in np.ndindex(x.shape):
            assert x[image, row, column, channel] == batch[b"data"][image, 1024 * channel + 32 * row + column]


def test_tiny_imagenet_is_read_with_its_labels(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = paper_archives.tiny_imagenet(tmp_path)
    found = datasets.find_archive("tiny-imagenet", tmp_path)
    assert found.digest == hashlib.md5(path.read_bytes()).hexdigest()
    images = found.read()
    assert sorted(images.train_y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.test_y.tolist() == [1, 0, 2, 1, 0]  # sorted by the names of the classes
    assert images.train_x.shape[1:] == images.test_x.shape[1:] == (64, 64, 3)
    means = np.concatenate([images.train_x, images.test_x]).mean((1, 2))
    colours = np.array([paper_archives.COLOURS[name] for name in sorted(paper_archives.COLOURS)])
    grey = np.ptp(means, axis=1) < 1
    assert grey.sum() == 3
    np.testing.assert_allclose(means[grey], 128, atol=2)
    labels = np.concatenate([images.train_y, images.test_y])
    np.testing.assert_allclose(means[~grey], colours[labels[~grey]], atol=4)  # JPEG is lossy


class Harm:
    """Creates a file in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("harm"),)


def write_tar(name: str, value: object) -> None:
    paper_archives.write_tar(Path("cifar-100-python.tar.gz"), {name: pickle.dumps(value)})


#: The source, the expected message, and a function that prepares the folder.
REFUSED: list[tuple[str, str, Callable[[], object]]] = [
    ("cifar100", "but must be a folder with cifar-100-python.tar.gz, which http.* offers$", lambda: None),
    ("cifar100", "must be CIFAR-100's archive from .*, but cannot be read: ", lambda: SOURCE.write_bytes(b"no archive")),
    ("cifar100", "but cannot be read: ", lambda: SOURCE.touch()),
    ("cifar100", "cannot be read: .*cifar-100-python/train", lambda: write_tar("cifar-10-batches-py/data_batch_1", {})),
    (
        "cifar100",
        "it contains .*, but may contain only NumPy's arrays",
        lambda: write_tar("cifar-100-python/train", {b"data": Harm()}),
    ),
    (
        "cifar100",
        "lacks images of classes 0 to 99 or has others",
        lambda: paper_archives.cifar100(Path(), train=120, classes=101),
    ),
    ("cifar100", "but lacks images of classes 0 to 99", lambda: paper_archives.cifar100(Path(), test=0)),
    ("tiny-imagenet", r"tiny-imagenet-200.zip must be .*, but cannot be read: ", lambda: Path("tiny-imagenet-200.zip").touch()),
]
SOURCE = Path(datasets.SOURCES["cifar100"].file)


@pytest.mark.parametrize(("source", "message", "write"), REFUSED)
def test_what_is_no_archive_of_the_data_is_refused_and_runs_no_code(
    source: str, message: str, write: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write()
    with pytest.raises(ValueError, match=message):
        datasets.find_archive(source, tmp_path).read()
    assert not Path("harm").exists()


def test_what_is_published_is_downloaded_once_and_what_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = pytest.importorskip("keras")
    home, web = tmp_path / "home", tmp_path / "web"
    for folder in (home, web):
        folder.mkdir()
    # Keep downloads apart from the user's.
    monkeypatch.setattr(keras.utils, "get_file", functools.partial(keras.utils.get_file, cache_dir=home))

    def download(name: str, **source: str) -> datasets.Archive:
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(datasets.SOURCES[name], **source))
        return datasets.find_archive(name)

    place = "Tiny ImageNet-200 cannot be downloaded .*: place tiny-imagenet-200.zip in a folder, and pass that folder as --data"
    with pytest.raises(ValueError, match=place):
        download("tiny-imagenet", url=(web / "absent").as_uri())
    published = paper_archives.cifar100(web)
    with pytest.raises(ValueError, match=r"CIFAR-100 cannot be downloaded \(.*hash does not match.*85cd44d0"):
        download("cifar100", url=published.as_uri())
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    found = download("cifar100", digest=digest)
    assert found.path == home / "datasets" / published.name
    assert found.digest == digest
    published.unlink()
    assert datasets.find_archive("cifar100").read().train_x.shape == (12, 32, 32, 3)
