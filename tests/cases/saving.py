"""Folders, the Hub and ONNX."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cases.form import Call, of_each, quantizer, refused
from torch import nn

import mmvq
from mmvq import onnx

CONFIG = {"class": "CLUBEstimator", "version": 1, "arguments": {}, "pass_again": {}}


def without_the_hub() -> object:
    with patch.dict(sys.modules, {"huggingface_hub": None}):
        return mmvq.CLUBEstimator(4, 4).save_pretrained("nowhere")


def from_text(text: str) -> Call:
    """`CLUBEstimator.from_pretrained` of a folder whose config.json is this."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            Path("saved").mkdir()
            Path("saved", "config.json").write_text(text)
            return mmvq.CLUBEstimator.from_pretrained("saved")

    return run


def from_saved(module: Any, **changes: Any) -> object:
    """The module, from a folder in whose config.json these arguments were changed."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        path = Path(folder, "config.json")
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "arguments": {**config["arguments"], **changes}}))
        return type(module).from_pretrained(folder)


def from_config(config: object, **options: Any) -> Call:
    """`CLUBEstimator.from_pretrained` of a folder with this config.json."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            if config is not None:
                Path(folder, "config.json").write_text(json.dumps(config))
            return mmvq.CLUBEstimator.from_pretrained(folder, **options)

    return run


def damaged(file: str) -> Call:
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


def a_newer_state() -> object:
    module = mmvq.CLUBEstimator(4, 4)
    state: Any = module.state_dict()
    state._metadata[""]["version"] = 2
    return module.load_state_dict(state)


def without_onnx() -> object:
    with patch.dict(sys.modules, {"onnx": None}):
        return onnx.export(quantizer(), "nowhere.onnx")


CLUB = "CLUBEstimator.from_pretrained"

SAVING = [
    refused(
        TypeError,
        "mmvq.onnx.export: quantizer must be a MultiModalEMAQuantizer",
        lambda: onnx.export(nn.Linear(4, 4), "file.onnx"),  # type: ignore[arg-type]
    ),
    refused(ImportError, "mmvq.onnx.export: ONNX needs onnx and onnxscript", without_onnx),
    refused(
        ImportError,
        "mmvq: the Hub's methods need huggingface_hub and safetensors",
        without_the_hub,
    ),
    refused(
        ValueError,
        f"{CLUB}: there must be a config.json as save_pretrained writes it",
        *(from_config(given) for given in (None, {}, [], {"x_dim": 4}, {**CONFIG, "version": "1"})),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer.from_pretrained: modalities must be those that were saved, in any "
        "order",
        under_other_names,
    ),
    refused(
        FileNotFoundError,
        f"{CLUB}: source must be a folder that save_pretrained wrote, or a repo on the Hub",
        *of_each(
            lambda source: mmvq.CLUBEstimator.from_pretrained(source, local_files_only=True),
            *("/no/such/folder", "./nor", "or/that", os.devnull),
        ),
    ),
    refused(
        ValueError,
        f"{CLUB}: config.json or model.safetensors in source is damaged",
        damaged("config.json"),
        damaged("model.safetensors"),
        from_text("[" * 10**5),
    ),
    refused(
        ValueError,
        f"{CLUB}: the arguments do not fit the class",
        from_config(CONFIG),
        *(
            from_config({**CONFIG, "arguments": {"x_dim": 4, "y_dim": 4, **odd}})
            for odd in ({"more": 1}, {"hidden_dim": 10**30})
        ),
    ),
    refused(
        ValueError,
        "CrossCPC.from_pretrained: num_layers of a saved module must be at most 1000",
        lambda: from_saved(mmvq.CrossCPC(4), num_layers=10**9),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer.from_pretrained: the arguments do not fit the class",
        *of_each(
            lambda changes: from_saved(mmvq.MultiModalEMAQuantizer(4, 8), **changes),
            *({"commitment": odd} for odd in ({}, {"beta": 1}, {"cross_ratio": [1]})),
            {"more": 1},
        ),
    ),
    refused(
        ValueError,
        f"{CLUB}: the file is of another class",
        *(from_config({**CONFIG, "class": x}) for x in ("CrossCPC", "Module", "Pretrained", [])),
    ),
    *(
        refused(
            kind,
            f"CLUBEstimator.{where}: the state is of version 2, this mmvq knows up to 1",
            call,
        )
        for kind, where, call in (
            (ValueError, "from_pretrained", from_config({**CONFIG, "version": 2})),
            (RuntimeError, "load_state_dict", a_newer_state),
        )
    ),
    refused(
        ValueError,
        f"{CLUB}: config.json cannot hold a, b",
        from_config({**CONFIG, "pass_again": {"a": "A", "b": "B", "c": "C"}}, c=1),
        hint="pass a=..., b=...",
    ),
]
