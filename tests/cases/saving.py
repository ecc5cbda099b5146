"""Folders, the Hub and ONNX."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cases.form import Case
from torch import nn

import mmvq
from mmvq import onnx
from mmvq.pretrained import _adapter

CONFIG = {"class": "CLUBEstimator", "version": 1, "arguments": {}, "pass_again": {}}


def without_the_hub() -> object:
    _adapter.cache_clear()
    with patch.dict(sys.modules, {"huggingface_hub": None}):
        return mmvq.CLUBEstimator(4, 4).save_pretrained("nowhere")


def from_config(config: object, **options: Any) -> Callable[[], object]:
    """`CLUBEstimator.from_pretrained` of a folder with this config.json."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            if config is not None:
                Path(folder, "config.json").write_text(json.dumps(config))
            return mmvq.CLUBEstimator.from_pretrained(folder, **options)

    return run


def damaged(file: str) -> Callable[[], object]:
    """`CLUBEstimator.from_pretrained` of a folder in which half of this file is missing."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            mmvq.CLUBEstimator(4, 4).save_pretrained("saved")
            path = Path("saved", file)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            return mmvq.CLUBEstimator.from_pretrained("saved")

    return run


def under_other_names() -> object:
    """A quantizer of audio and video, loaded as one of sound and picture."""
    with tempfile.TemporaryDirectory() as folder:
        mmvq.MultiModalEMAQuantizer(4, 8).save_pretrained(folder)
        names = ("sound", "picture")
        return mmvq.MultiModalEMAQuantizer.from_pretrained(folder, modalities=names)


def without_onnx() -> object:
    with patch.object(onnx, "find_spec", lambda name: None):
        return onnx.translation_table()


SAVING = [
    Case(
        lambda: onnx.export(nn.Linear(4, 4), "file.onnx"),  # type: ignore[arg-type]
        TypeError,
        "mmvq.onnx.export: quantizer must be a MultiModalEMAQuantizer",
        "quantizer: Linear",
        "pass the module itself: not the model around it, and before torch.compile",
    ),
    Case(
        without_onnx,
        ImportError,
        "mmvq.onnx: ONNX needs onnx and onnxscript",
        "missing: ['onnx', 'onnxscript']",
        "pip install 'mmvq[onnx]'",
    ),
    Case(
        without_the_hub,
        ImportError,
        "mmvq: the Hub's methods need huggingface_hub and safetensors",
        "missing: 'huggingface_hub'",
        "pip install 'mmvq[hub]'",
    ),
    *(
        Case(
            from_config(config),
            ValueError,
            "CLUBEstimator.from_pretrained: there must be a config.json as save_pretrained writes "
            "it",
            f"config: {config!r}",
            "check the folder or the repo's name, or save the module again",
        )
        for config in (None, {}, {"x_dim": 4}, {**CONFIG, "version": "1"})
    ),
    Case(
        under_other_names,
        ValueError,
        "MultiModalEMAQuantizer.from_pretrained: modalities must be those that were saved, in any "
        "order",
        "saved: ['audio', 'video']   got: ('sound', 'picture')",
        "load without modalities, then add new ones with extended(modalities=...)",
    ),
    *(
        Case(
            lambda source=source: mmvq.CLUBEstimator.from_pretrained(source, local_files_only=True),
            FileNotFoundError,
            "CLUBEstimator.from_pretrained: source must be a folder that save_pretrained wrote, or "
            "a repo on the Hub",
            f"source: {source!r}",
            'check the path: the folder, not a file in it; a repo is named "user/name"',
        )
        for source in ("/no/such/folder", "./nor", "or/that", os.devnull)
    ),
    *(
        Case(
            damaged(file),
            ValueError,
            "CLUBEstimator.from_pretrained: config.json or model.safetensors in source is damaged",
            f"source: 'saved'   error: {error}",
            "copy or download it again",
        )
        for file, error in (
            ("config.json", "JSONDecodeError"),
            ("model.safetensors", "SafetensorError"),
        )
    ),
    Case(
        from_config({**CONFIG, "class": "CrossCPC"}),
        ValueError,
        "CLUBEstimator.from_pretrained: the file is of another class",
        "found: 'CrossCPC'",
        "call from_pretrained of CrossCPC",
    ),
    Case(
        from_config({**CONFIG, "version": 2}),
        ValueError,
        "CLUBEstimator.from_pretrained: the state is of version 2, this mmvq knows up to 1",
        "version: 2",
        "install the mmvq that saved it",
    ),
    Case(
        from_config({**CONFIG, "pass_again": {"a": "A", "b": "B", "c": "C"}}, c=1),
        ValueError,
        "CLUBEstimator.from_pretrained: config.json cannot hold a, b",
        "a: 'A'   b: 'B'",
        "pass a=..., b=... to from_pretrained",
    ),
]
