"""Small files in exactly the formats of the released features."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

CLASSES = ("Dog bark", "Violin", "Speech")
rng = np.random.default_rng(0)


def zip_of(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=4)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}.pkl", data)


def features(kind: str, label: int, T: int = 10) -> np.ndarray:
    """Noise about a mean of the class's own, so that something can be learned."""
    shape = (T, 128) if kind == "audio" else (T, 7, 7, 512)
    mean = np.random.default_rng(label).standard_normal(shape[-1])
    return (mean + 0.5 * rng.standard_normal(shape)).astype(np.float32)


def table(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], sep: str = ","
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [sep.join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n")


def h5(path: Path, key: str, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = array


def vggsound_avel(root: Path, clips: int = 30) -> list[tuple[str, str, str]]:
    rows = []
    for n in range(clips):
        name, label = f"video{n:06d}", n % len(CLASSES)
        split = ("train", "val", "test")[n // len(CLASSES) % 3]
        rows.append((split, CLASSES[label], name))
        zip_of(root / "audio" / "zip" / f"{name}.zip", features("audio", label, T=8 + n % 4))
        zip_of(root / "video" / "zip" / f"{name}.zip", features("video", label))
        heard = np.ones((10, 1))
        heard[n % 3 : 2 + n % 3] = 0
        zip_of(root / "label" / "zip" / f"{name}.zip", heard)
    table(root / "vggsound-avel40k.csv", ("split", "category", "video_id"), rows)
    (root / "VggsoundAVEL40kCategories.txt").write_text("\n".join(CLASSES) + "\n")
    prompts = [(name, f"the sound of {name.lower()}") for name in CLASSES]
    table(root / "vggsoundCategories2Prompts.csv", ("label", "prompt"), prompts)
    return rows


def ave(root: Path, clips: int = 12) -> np.ndarray:
    labels = np.zeros((clips, 10, 29))
    for n in range(clips):
        labels[n, :6, n % 3] = 1
        labels[n, 6:, -1] = 1
    h5(root / "labels.h5", "avadataset", labels)
    for kind, file in (("audio", "audio_feature.h5"), ("video", "visual_feature.h5")):
        h5(root / file, "avadataset", np.stack([features(kind, n % 3) for n in range(clips)]))
    order = np.arange(clips)[::-1]
    for split, part in zip(("train", "val", "test"), np.split(order, 3), strict=True):
        h5(root / f"{split}_order.h5", "order", part)
    return labels


AVVP_ROWS = (
    ("IgN7v8nWmx8_30_40", "Speech,Speech,Violin,Violin,Violin", "0,5,0,6,9", "1,9,5,8,10"),
    ("-abcdefghij_0_10", "Dog bark", "3", "10"),
    ("0123456789A_5_15", "Violin,Dog bark", "0,2", "2,4"),
    ("qwertyuiopa_5_15", "Speech", "0", "10"),
    ("zxcvbnmasdf_5_15", "Speech,Dog bark", "0,9", "10,10"),
    ("poiuytrewqA_5_15", "Violin", "1", "2"),
)


def avvp(
    root: Path, stem: str = "AVVP_eval", data: str = "data", features_at: str = "feature"
) -> None:
    header = ("filename", "event_labels", "onset", "offset")
    table(root / data / f"{stem}_audio_checked_combined.csv", header, AVVP_ROWS, "\t")
    table(root / data / f"{stem}_visual_checked_combined.csv", header, AVVP_ROWS[::-1], "\t")
    (root / data / f"{stem.removesuffix('_eval')}_Categories.txt").write_text("\n".join(CLASSES))
    for n, row in enumerate(AVVP_ROWS):
        for kind in ("audio", "video"):
            zip_of(root / features_at / kind / "zip" / f"{row[0][:11]}.zip", features(kind, n % 3))


def ucf_vggsound(root: Path) -> None:
    names = {
        "UCF101sameVGGSound.txt": ("Archery", "Drumming"),
        "VGGSoundsameUCF101.txt": ("archery", "playing drum kit"),
    }
    for file, classes in names.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("\n".join(classes))
    for stem, kind, folder, file in (
        ("ucf2vggsound", "video", "UCF101/feature/video/zip", "UCF101sameVGGSound.txt"),
        ("vggsound2ucf", "audio", "vggsound40k/feature/audio/zip", "VGGSoundsameUCF101.txt"),
    ):
        rows = [(f"{stem}{n}", names[file][n % 2]) for n in range(4)]
        table(root / f"{stem}.csv", ("video_id", "category"), rows)
        for n, (name, _) in enumerate(rows):
            zip_of(root / folder / f"{name}.zip", features(kind, n % 2, T=9))
