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


def batch_of(archive: Path, part: str) -> dict[bytes, object]:
    """As CIFAR's own page says to read it."""
    with tarfile.open(archive) as tar:
        return pickle.load(tar.extractfile(f"cifar-100-python/{part}"), encoding="bytes")


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # the plain unpickler takes NumPy's old name
def test_cifar100_is_read_as_its_page_says(tmp_path: Path) -> None:
    path = paper_archives.cifar100(tmp_path)
    found = datasets.find_archive("cifar100", tmp_path)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    images = found.read()
    for part, x, y in (("train", images.train_x, images.train_y), ("test", images.test_x, images.test_y)):
        batch = batch_of(path, part)
        assert y.tolist() == batch[b"fine_labels"]
        assert x.dtype == np.uint8
        # "The first 1024 entries contain the red channel values, ... in row-major order."
        rows = batch[b"data"]
        for image, row, column, channel in ((0, 0, 1, 0), (1, 5, 0, 1), (2, 31, 30, 2)):
            assert x[image, row, column, channel] == rows[image, 1024 * channel + 32 * row + column]
        assert np.array_equal(np.sort(x.reshape(len(x), -1)), np.sort(rows))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "harm",)

    harmful = pickle.dumps({b"data": Harm()})
    paper_archives.write_tar(tmp_path / "cifar-100-python.tar.gz", {"cifar-100-python/train": harmful})
    with pytest.raises(ValueError, match=r"cannot be read: it contains [\w.]+, but may contain only NumPy's arrays"):
        datasets.find_archive("cifar100", tmp_path).read()
    assert not (tmp_path / "harm").exists()
    pickle.loads(harmful)
    assert (tmp_path / "harm").exists()


def test_tiny_imagenet_is_read_with_its_labels(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = paper_archives.tiny_imagenet(tmp_path)
    found = datasets.find_archive("tiny-imagenet", tmp_path)
    assert found.digest == hashlib.md5(path.read_bytes()).hexdigest()
    images = found.read()
    wnids = sorted(paper_archives.COLOURS)
    assert sorted(images.train_y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.test_y.tolist() == [
        wnids.index(wnid) for wnid in (*paper_archives.COLOURS, *list(paper_archives.COLOURS)[:2])
    ]
    grey = 0
    for image, label in [*zip(images.train_x, images.train_y, strict=True), *zip(images.test_x, images.test_y, strict=True)]:
        assert image.shape == (64, 64, 3)
        mean = image.mean((0, 1))
        if np.ptp(mean) < 1:
            grey += 1
            assert mean[0] == pytest.approx(128, abs=2)
        else:
            assert mean == pytest.approx(paper_archives.COLOURS[wnids[label]], abs=4)  # JPEG is lossy
    assert grey == 3


@pytest.mark.parametrize("name", datasets.SOURCES)
def test_a_folder_without_the_archive_is_said(tmp_path: Path, name: str) -> None:
    source = datasets.SOURCES[name]
    with pytest.raises(ValueError) as error:
        datasets.find_archive(name, tmp_path)
    assert str(error.value) == f"--data-dir is {tmp_path}, but must be a folder with {source.file}, which {source.url} offers"


@pytest.mark.parametrize("name", datasets.SOURCES)
@pytest.mark.parametrize("damage", [b"no archive", b""])
def test_a_damaged_archive_is_said(tmp_path: Path, name: str, damage: bytes) -> None:
    path = tmp_path / datasets.SOURCES[name].file
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=f"{path.name} must be .*'s archive from .*, but cannot be read: "):
        datasets.find_archive(name, tmp_path).read()


def test_archives_of_other_data_are_said(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-python.tar.gz"
    paper_archives.write_tar(path, {"cifar-10-batches-py/data_batch_1": b""})
    with pytest.raises(ValueError, match=r"cannot be read: .*cifar-100-python/train"):
        datasets.find_archive("cifar100", tmp_path).read()
    paper_archives.cifar100(tmp_path, train=120, classes=101)
    with pytest.raises(ValueError, match="lacks images of classes 0 to 99 or has others"):
        datasets.find_archive("cifar100", tmp_path).read()
    paper_archives.cifar100(tmp_path, test=0)
    with pytest.raises(ValueError, match="lacks images of classes 0 to 99 or has others"):
        datasets.find_archive("cifar100", tmp_path).read()


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


def test_what_is_not_the_published_file_is_refused(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataclasses.replace(datasets.SOURCES["cifar100"], url=published.as_uri())
    monkeypatch.setitem(datasets.SOURCES, "cifar100", source)
    with pytest.raises(ValueError, match=r"CIFAR-100 cannot be downloaded \(.*hash does not match.*85cd44d0"):
        datasets.find_archive("cifar100")


def test_without_a_network_it_says_what_to_place_where(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in list(datasets.SOURCES.items()):
        absent = dataclasses.replace(source, url=(published.parent / "absent" / source.file).as_uri())
        monkeypatch.setitem(datasets.SOURCES, name, absent)
        what = f"{source.title} cannot be downloaded .*: place {source.file} in a folder, and pass that folder as --data-dir"
        with pytest.raises(ValueError, match=what):
            datasets.find_archive(name)
