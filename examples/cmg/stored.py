"""Save a trained model as a folder, and load it from there or from the Hugging Face Hub.

model.safetensors holds all of it; config.json is for people. Beside the settings of the model, the
config has a key "data": what is known of the features and classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_model, save_model
from .clips import Clips
from .errors import DataError, optional_import
from .heads import Head, Heads
from .model import Config, UniCode
from .standardize import Standardizer
from .trained import About, TrainedModel

_ABOUT = "data"  # key of the config
_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def save_run(
    folder: str | Path,
    model: UniCode,
    standardizer: Standardizer,
    clips: Clips,
    heads: Heads | None = None,
) -> None:
    """Write model.safetensors and config.json.

    Args:
        folder: The folder of the run.
        model: The trained model.
        standardizer: The standardizer of its features.
        clips: The clips of training, with raw features.
        heads: Classifiers of its codes; None: there are none.
    """
    tensors = model.state_dict() | standardizer.tensors()
    for kind, each in heads._asdict().items() if heads else ():
        for name, head in each.items():
            tensors |= {f"heads/{kind}/{name}/{key}": x for key, x in vars(head).items()}
    save_model(folder, tensors, model.config.json() | {_ABOUT: asdict(About.of(clips))})


def load_run(source: str | Path, **hub: Any) -> TrainedModel:
    """Load a run on the CPU; see `UniCode.from_pretrained`.

    Raises:
        DataError: There is no such run, or it is damaged or of another version of this example.
    """
    tensors, content = load_model(_folder(source, hub))
    try:
        about = _about(content.pop(_ABOUT, {}))
        config = Config(**content)
        shapes = {name: (cells, channels) for name, (cells, channels) in config.shapes.items()}
        config = replace(config, shapes=shapes, without=tuple(config.without))
        # a config may ask for any size: memory is that of the file's tensors
        with torch.device("meta"):
            model = UniCode(replace(config, without=(*config.without, "cpc")))
        semantic = {name: x.float() for name, x in _part(tensors, "semantic.").items()}
        model.semantic.load_state_dict(semantic, assign=True)
        model.quantizer.load_state_dict(_part(tensors, "quantizer."), assign=True)
        model.config = config
        standardizer = Standardizer.from_tensors(tensors)
        if {*standardizer.mean} != {*shapes} or {*standardizer.axes} != {*shapes}:
            raise ValueError(f"it has no standardizer of {' '.join(shapes)}")
        for name, (cells, width) in shapes.items():
            if standardizer.axes[name].shape != (len(standardizer.mean[name]), width):
                raise ValueError(f"the standardizer of {name} does not fit")
            if math.prod(about.grids.get(name, (cells,))) != cells:
                raise ValueError(f"the grid of {name} does not fit")
        heads = _heads(tensors, config, len(about.class_names))
        if odd := [name for name, x in tensors.items() if not x.isfinite().all()]:
            raise ValueError(f"{odd[0]} is not finite")
        return TrainedModel(str(source), model, standardizer, heads, about)
    except Exception as error:  # a config can hold anything
        rule = "a model of another version of this example, or damaged"
        first = str(error).partition("\n")[0]
        raise DataError(f"{source}: {rule} ({first}). Hint: train it again.") from error


def _folder(source: str | Path, hub: Mapping[str, Any]) -> Path:
    """The folder of a run, downloaded if it is on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not _ON_THE_HUB.fullmatch(str(source)):
        raise DataError(f"{source}: no such folder. Hint: RUN is the --output of cmg_pretrain.py.")
    try:
        with optional_import(f"{source}, on the Hub", "pip install 'mmvq[hub]'"):
            from huggingface_hub import snapshot_download
        files = ["model.safetensors", "config.json"]
        return Path(snapshot_download(str(source), allow_patterns=files, **hub))
    except DataError:
        raise
    except Exception as error:  # many types, also those of the file system and of the network
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source}: neither a folder nor on the Hub ({text:.300}).") from error


def _about(content: Any) -> About:
    found = About(**content)
    grids = {name: tuple(grid) for name, grid in found.grids.items()}
    names = [*found.encoders, *found.encoders.values(), *found.class_names]
    texts = isinstance(found.class_names, list | tuple) and all(isinstance(x, str) for x in names)
    sizes = all(type(n) is int and n > 0 for grid in grids.values() for n in grid)
    seconds = found.seconds is None or 0 < found.seconds < math.inf
    if not (texts and sizes and seconds):
        raise ValueError(f"{_ABOUT} in its config is {content!r:.100}")
    return replace(found, class_names=tuple(found.class_names), grids=grids)


def _heads(tensors: Mapping[str, Tensor], config: Config, names: int) -> Heads:
    """The classifiers, of this many class names; 0: the classes have no names."""
    heads = Heads({}, {})
    for kind, width, first in (("clips", 2 * config.dim, 0), ("segments", config.dim, 1)):
        parts: dict[str, dict[str, Tensor]] = {}
        for key, x in _part(tensors, f"heads/{kind}/").items():
            name, _, part = key.partition("/")
            parts.setdefault(name, {})[part] = x
        for name in sorted(parts, key=[*config.shapes].index):
            head = Head(**parts[name])
            K = len(head.classes)
            shapes = [tuple(x.shape) for x in vars(head).values()]
            ascending = bool((head.classes.diff() > 0).all()) and int(head.classes[0]) >= 0
            known = not names or int(head.classes[-1]) < names + first
            if shapes != [(width,), (), (K, width), (K,), (K,)] or not ascending or not known:
                raise ValueError(f"the {kind} head of {name} does not fit")
            getattr(heads, kind)[name] = head
    return heads


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
