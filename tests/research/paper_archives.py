"""Tiny archives of CIFAR-100 and Tiny ImageNet-200 in the published formats."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class Python2Pickler(pickle._Pickler):
    """Pickles like Python 2, which made the published archive: all strings are bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: str | bytes) -> None:
        data = text.encode("latin-1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_bytes


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    # Use the earlier name of NumPy's module.
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def cifar100(folder: Path, train: int = 12, test: int = 5, classes: int = 100) -> Path:
    """Make an archive of noise; the classes of the training images count up, those of the test images down."""
    rng = np.random.default_rng(1)
    members = {}
    for part, count in (("train", train), ("test", test)):
        labels = [number % classes for number in range(count)]
        batch = {
            b"filenames": [b"image_%d.png" % number for number in range(count)],
            b"batch_label": b"a tiny batch",
            b"fine_labels": labels if part == "train" else labels[::-1],
            b"coarse_labels": [label // 5 for label in labels],
            b"data": rng.integers(0, 256, (count, 3072), np.uint8),
        }
        members[f"cifar-100-python/{part}"] = python2_pickle(batch)
    path = folder / "cifar-100-python.tar.gz"
    write_tar(path, members)
    return path


#: The classes of the tiny Tiny ImageNet, unsorted, and the colour of their images.
COLOURS = {"n02124075": (200, 30, 30), "n01443537": (30, 200, 30), "n04067472": (30, 30, 200)}


def jpeg(colour: tuple[int, int, int] | int) -> bytes:
    """Return an image of one colour; a number makes a grey image with one channel, like some of the published ones."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", (64, 64), colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def tiny_imagenet(folder: Path, train: int = 3, test: int = 5) -> Path:
    """Make an archive of `train` images of each class, the last one grey, and `test` images of the classes in turn."""
    top, wnids = "tiny-imagenet-200", list(COLOURS)
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}/wnids.txt", "".join(f"{wnid}\n" for wnid in wnids))
        archive.writestr(f"{top}/words.txt", "".join(f"{wnid}\ta word\n" for wnid in wnids))
        for wnid, colour in COLOURS.items():
            names = [f"{wnid}_{number}.JPEG" for number in range(train)]
            archive.writestr(f"{top}/train/{wnid}/{wnid}_boxes.txt", "".join(f"{name}\t0\t0\t63\t63\n" for name in names))
            for name in names:
                archive.writestr(f"{top}/train/{wnid}/images/{name}", jpeg(128 if name == names[-1] else colour))
        lines = []
        for number in range(test):
            wnid = wnids[number % len(wnids)]
            archive.writestr(f"{top}/val/images/val_{number}.JPEG", jpeg(COLOURS[wnid]))
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(lines))
        archive.writestr(f"{top}/test/images/test_0.JPEG", jpeg((0, 0, 0)))
    return path
