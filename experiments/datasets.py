"""Load CIFAR-100 and Tiny ImageNet-200 from their published archives, downloaded and checked, or from a folder."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Images(NamedTuple):
    """A data set in memory.

    Attributes:
        train_x: training images as bytes, channels last.
        train_y: the class number of each.
        test_x: likewise, the test images.
        test_y: likewise.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class Source:
    """A data set's archive and properties.

    Attributes:
        title: its name in tables.
        file: the archive's name.
        url: of the archive.
        algorithm: of the digest.
        digest: the published digest of the archive.
        classes: the number of classes.
        side: height and width of an image.
        mean: of each channel, where white is 1.
        deviation: likewise the standard deviation.
        read: reads the archive.
    """

    title: str
    file: str
    url: str
    algorithm: str
    digest: str
    classes: int
    side: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    read: Callable[[Path], Images]


class _ArraysAlone(pickle.Unpickler):
    """Unpickles only NumPy's arrays and Python's built-in types; a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # its module depends on NumPy's version
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, but may contain only NumPy's arrays")


def _read_cifar100(path: Path) -> Images:
    found = []
    with tarfile.open(path) as archive:
        for part in ("train", "test"):
            with archive.extractfile(f"cifar-100-python/{part}") as file:  # type: ignore[union-attr]
                batch = _ArraysAlone(file, encoding="bytes").load()
            # The archive stores channel by channel.
            found.append(np.ascontiguousarray(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
            found.append(np.asarray(batch[b"fine_labels"], np.int32))
    return Images(*found)


def _read_tiny_imagenet(path: Path) -> Images:
    with zipfile.ZipFile(path) as archive:
        top = "tiny-imagenet-200"
        wnids = sorted(archive.read(f"{top}/wnids.txt").decode().split())
        number = {wnid: place for place, wnid in enumerate(wnids)}
        train = [
            (name, number[name.split("/")[2]])
            for name in archive.namelist()
            if name.startswith(f"{top}/train/") and name.endswith(".JPEG")
        ]
        lines = archive.read(f"{top}/val/val_annotations.txt").decode().splitlines()
        # Each line has the file, its class, and a box.
        test = [(f"{top}/val/images/{file}", number[wnid]) for file, wnid, *_ in (line.split("\t") for line in lines)]
        return Images(*_decode_images(archive, train), *_decode_images(archive, test))


def _decode_images(archive: zipfile.ZipFile, labelled: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Tiny ImageNet's images are JPEG files, but Pillow is missing: pip install pillow") from error
    images = np.empty((len(labelled), 64, 64, 3), np.uint8)
    for place, (name, _) in enumerate(labelled):
        with Image.open(io.BytesIO(archive.read(name))) as image:
            images[place] = image.convert("RGB")  # some are grey
    return images, np.array([label for _, label in labelled], np.int32)


SOURCES: dict[str, Source] = {
    "cifar100": Source(
        title="CIFAR-100",
        file="cifar-100-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        algorithm="sha256",
        digest="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        classes=100,
        side=32,
        mean=(0.5071, 0.4867, 0.4408),
        deviation=(0.2675, 0.2565, 0.2761),
        read=_read_cifar100,
    ),
    "tiny-imagenet": Source(
        title="Tiny ImageNet-200",
        file="tiny-imagenet-200.zip",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        algorithm="md5",  # the only published digest in wide use
        digest="90528d7ca1a48142e341f4ef8d21d0de",
        classes=200,
        side=64,
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
        read=_read_tiny_imagenet,
    ),
}


class Archive(NamedTuple):
    """An archive on the disk.

    Attributes:
        source: its data set.
        path: of the file.
        digest: of the file.
    """

    source: Source
    path: Path
    digest: str

    def read(self) -> Images:
        """Read the images.

        Raises:
            ValueError: the file is not an archive of this data set.
        """
        what = f"{self.path} must be {self.source.title}'s archive from {self.source.url}"
        try:
            images = self.source.read(self.path)
        except (
            EOFError,
            LookupError,
            OSError,
            ValueError,
            pickle.UnpicklingError,
            tarfile.TarError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(f"{what}, but cannot be read: {error}") from error
        for labels in (images.train_y, images.test_y):
            if not labels.size or labels.min() < 0 or labels.max() >= self.source.classes:
                raise ValueError(f"{what}, but lacks images of classes 0 to {self.source.classes - 1} or has others")
        return images


def find_archive(name: str, data_dir: Path | None = None) -> Archive:
    """Find the archive of a data set in a folder, or download it.

    Keras checks a download and keeps it in `~/.keras/datasets`, or under `$KERAS_HOME`.

    Args:
        name: a key of `SOURCES`.
        data_dir: the folder with the published archive; None: download it.

    Returns:
        The archive.

    Raises:
        ValueError: the archive is missing; the message names the file and the folder to place it in.
    """
    source = SOURCES[name]
    path = _download_archive(source) if data_dir is None else data_dir / source.file
    if not path.is_file():
        raise ValueError(f"--data-dir is {data_dir}, but must be a folder with {source.file}, which {source.url} offers")
    with path.open("rb") as file:
        return Archive(source, path, hashlib.file_digest(file, source.algorithm).hexdigest())


def _download_archive(source: Source) -> Path:
    import keras

    what = {"fname": source.file, "origin": source.url, "file_hash": source.digest, "hash_algorithm": source.algorithm}
    try:
        return Path(keras.utils.get_file(**what))
    except Exception as error:  # Keras raises no narrower one
        where = f"place {source.file} in a folder, and pass that folder as --data-dir"
        raise ValueError(f"{source.title} cannot be downloaded ({error}): {where}") from error
