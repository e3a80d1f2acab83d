"""The data sets: read as they are published, checked, and where they cannot be had, said in a sentence."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from research import paper_archives

from experiments import datasets


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # the plain unpickler takes NumPy's old name
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
    assert images.test_y.tolist() == [1, 0, 2, 1, 0]  # in the order of the names of the classes
    assert images.train_x.shape[1:] == images.test_x.shape[1:] == (64, 64, 3)
    means = np.concatenate([images.train_x, images.test_x]).mean((1, 2))
    colours = np.array([paper_archives.COLOURS[name] for name in sorted(paper_archives.COLOURS)])
    grey = np.ptp(means, axis=1) < 1
    assert grey.sum() == 3
    np.testing.assert_allclose(means[grey], 128, atol=2)
    labels = np.concatenate([images.train_y, images.test_y])
    np.testing.assert_allclose(means[~grey], colours[labels[~grey]], atol=4)  # JPEG is lossy


class Harm:
    """Touches a file in the working directory as it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("harm"),)


def write_tar(name: str, value: object) -> None:
    paper_archives.write_tar(Path("cifar-100-python.tar.gz"), {name: pickle.dumps(value)})


REFUSED = {
    "but must be a folder with cifar-100-python.tar.gz, which http.* offers$": lambda: None,
    "must be CIFAR-100's archive from .*, but cannot be read: ": lambda: SOURCE.write_bytes(b"no archive"),
    "but cannot be read: ": lambda: SOURCE.touch(),
    "cannot be read: .*cifar-100-python/train": lambda: write_tar("cifar-10-batches-py/data_batch_1", {}),
    "it contains .*, but may contain only NumPy's arrays": lambda: write_tar("cifar-100-python/train", {b"data": Harm()}),
    "lacks images of classes 0 to 99 or has others": lambda: paper_archives.cifar100(Path(), train=120, classes=101),
    "but lacks images of classes 0 to 99": lambda: paper_archives.cifar100(Path(), test=0),
}
SOURCE = Path(datasets.SOURCES["cifar100"].file)


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_archive_of_the_data_is_refused_and_runs_no_code(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    REFUSED[message]()
    with pytest.raises(ValueError, match=message):
        datasets.find_archive("cifar100", tmp_path).read()
    assert not Path("harm").exists()


@pytest.mark.parametrize("text", [b"no archive", b""])
def test_a_damaged_archive_of_tiny_imagenet_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(text)
    with pytest.raises(ValueError, match=r"tiny-imagenet-200.zip must be .*, but cannot be read: "):
        datasets.find_archive("tiny-imagenet", tmp_path).read()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny archive, and what is downloaded kept apart from the user's."""
    keras = pytest.importorskip("keras")
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(keras.utils, "get_file", functools.partial(keras.utils.get_file, cache_dir=tmp_path / "home"))
    (tmp_path / "web").mkdir()
    return paper_archives.cifar100(tmp_path / "web")


def test_what_is_published_is_downloaded_once(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    source = dataclasses.replace(datasets.SOURCES["cifar100"], url=published.as_uri(), digest=digest)
    monkeypatch.setitem(datasets.SOURCES, "cifar100", source)
    found = datasets.find_archive("cifar100")
    assert found.path == tmp_path / "home" / "datasets" / published.name
    assert found.digest == digest
    published.unlink()
    assert datasets.find_archive("cifar100").read().train_x.shape == (12, 32, 32, 3)


def test_what_cannot_be_downloaded_says_why_and_what_to_place_where(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, url: str) -> None:
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(datasets.SOURCES[name], url=url))
        datasets.find_archive(name)

    with pytest.raises(ValueError, match=r"CIFAR-100 cannot be downloaded \(.*hash does not match.*85cd44d0"):
        download("cifar100", published.as_uri())
    place = (
        "Tiny ImageNet-200 cannot be downloaded .*: place tiny-imagenet-200.zip in a folder, and pass that folder as --data-dir"
    )
    with pytest.raises(ValueError, match=place):
        download("tiny-imagenet", (published.parent / "absent").as_uri())
