"""AVSBench-S4: five frames of a video, masks of the sounding object, and audio features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .arrays import fit_length, read_zip
from .sets import read_table

FRAMES = 5
_PIXELS = 2**24  # maximum of an image; the released frames have 224 x 224


class AVSClip(NamedTuple):
    """One video.

    Attributes:
        name: Name of the video.
        category: Category of the sounding object.
        prompt: Sentence that names the category.
        frames: uint8 [5, H, W, 3].
        masks: bool [n, H, W], n = 1 in training (of the first frame), otherwise 5.
        audio: float32 [5, 128].
    """

    name: str
    category: str
    prompt: str
    frames: Tensor
    masks: Tensor
    audio: Tensor


class AVSBenchS4:
    """The clips of a split, read when indexed.

    Args:
        root: Folder with s4_meta_data.csv, AVSBenchCategories2Prompts.csv,
            s4_data/{visual_frames,gt_masks}/SPLIT/CATEGORY/NAME/NAME_i.png and
            audio/SPLIT/zip/CATEGORY/NAME.zip.
        split: "train", "val" or "test".

    Raises:
        DataError: A table is missing or malformed, or the split has no clips.
    """

    def __init__(self, root: Path, split: str) -> None:
        rows = read_table(root / "s4_meta_data.csv", ("name", "split", "category"))
        self.root, self.split = root, split
        self.rows = [(row["name"], row["category"]) for row in rows if row["split"] == split]
        if not self.rows:
            raise DataError(f"{root}: no clips of split '{split}' in s4_meta_data.csv.")
        prompts = read_table(root / "AVSBenchCategories2Prompts.csv", ("label", "prompt"))
        self.prompts = {row["label"]: row["prompt"] for row in prompts}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AVSClip:
        """Read a clip.

        Raises:
            DataError: One of its files is missing or malformed.
        """
        name, category = self.rows[index]
        if category not in self.prompts:
            raise DataError(f"{self.root}: category '{category}' has no prompt.")
        folders = [
            self.root / "s4_data" / kind / self.split / category / name
            for kind in ("visual_frames", "gt_masks")
        ]
        count = 1 if self.split == "train" else FRAMES
        frames, masks = (
            _images([folder / f"{name}_{i + 1}.png" for i in range(n)], mode)
            for folder, n, mode in zip(folders, (FRAMES, count), ("RGB", "1"), strict=True)
        )
        path = self.root / "audio" / self.split / "zip" / category / f"{name}.zip"
        audio = fit_length(f"{path}: audio", read_zip(path), (FRAMES, 128))
        return AVSClip(
            name,
            category,
            self.prompts[category],
            frames,
            masks,
            torch.from_numpy(audio),
        )


def _images(paths: Sequence[Path], mode: str) -> Tensor:
    """The png files of one size, stacked."""
    images = [_image(path, mode) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            first = list(images[0].shape)
            raise DataError(f"{path}: must be {first} as the first; got {list(image.shape)}.")
    return torch.stack(images)


def _image(path: Path, mode: str) -> Tensor:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _PIXELS:
                raise DataError(f"{path}: must have at most {_PIXELS} pixels; got {image.size}.")
            return torch.from_numpy(np.array(image.convert(mode)))
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types for damaged bytes
        raise DataError(f"{path}: missing, or not a png image ({error}).") from error
