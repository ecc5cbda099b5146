"""Save and load training states and models as safetensors, without pickle.

A checkpoint is ONE safetensors file. Tensors are stored as tensors, everything else (numbers,
strings, nesting) as JSON in the metadata of the file. The write is atomic: if it is interrupted,
the previous checkpoint is unchanged. Loading restores every value exactly. The metadata has a
checksum of all that the file holds; files without one are read too.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import DataError
from .files import write_atomic

_KEY = "mmvq_cmg_state"


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a training state.

    Args:
        path: The file to create or replace.
        state: Nested dicts (keys str or int), lists and tuples of tensors, numbers, strings,
            booleans and None, such as the `state_dict()` of modules, optimizers and schedulers,
            `random_state()`, counters and the history.

    Raises:
        TypeError: The state holds a value or key of another type.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    write_atomic(path, _content(tensors, _KEY, json.dumps(tree)))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, with tensors on the CPU.

    Raises:
        DataError: The file is missing, damaged, or not a checkpoint of this example.
    """
    tensors, text = _read(path, _KEY, "checkpoint")
    return _dict(path, "checkpoint", lambda: _unflatten(json.loads(text), tensors))


def save_model(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write model.safetensors, which includes the config, and config.json for people."""
    folder = Path(folder)
    content = {name: _on_cpu(x) for name, x in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    write_atomic(folder / "model.safetensors", _content(content, "config", text))
    write_atomic(folder / "config.json", text.encode())


def load_model(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and the config that `save_model` wrote, both from model.safetensors.

    Raises:
        DataError: The file is missing, damaged, or has no config.
    """
    path = Path(folder) / "model.safetensors"
    tensors, text = _read(path, "config", "model")
    return tensors, _dict(path, "model", lambda: json.loads(text))


def random_state() -> dict[str, Any]:
    """The state of torch's global random generators, on the CPU and every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _content(tensors: Mapping[str, Tensor], key: str, text: str) -> bytes:
    """A safetensors file of the tensors, with the text under `key` of its metadata."""
    # in one entry, as safetensors writes several in random order
    return save(dict(tensors), metadata={key: f"{_checksum(tensors, text)} {text}"})


def _read(path: str | Path, key: str, kind: str) -> tuple[dict[str, Tensor], str]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except Exception as error:  # SafetensorError, OSError; torch's for a dtype it lacks
        raise DataError(f"{path}: damaged, or not a safetensors file ({error}).") from error
    if metadata.keys() != {key}:
        raise DataError(f"{path}: not a {kind} of this example; it has {sorted(metadata)}.")
    text = metadata[key]
    if parts := re.fullmatch(r"([0-9a-f]{8}) (.*)", text, re.DOTALL):
        expected, text = parts.groups()
        if (found := _checksum(tensors, text)) != expected:
            rule = f"damaged: its checksum is {found}, and was {expected}"
            raise DataError(f"{path}: {rule}. Hint: copy it again.")
    return tensors, text


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """A checksum of names, types, shapes, bytes and text."""
    total = zlib.crc32(text.encode())
    for name, x in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {x.dtype} {list(x.shape)}".encode(), total)
        total = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _dict(path: str | Path, kind: str, parse: Callable[[], Any]) -> dict[str, Any]:
    try:
        if isinstance(found := parse(), dict):
            return found
        raise TypeError(f"it has a {type(found).__name__}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a {kind} of this example ({error!r}).") from error


def _on_cpu(x: Tensor) -> Tensor:
    """A contiguous copy that shares no memory with other tensors, as the format requires."""
    return x.detach().cpu().clone(memory_format=torch.contiguous_format)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of `value` into `tensors`; return the rest as JSON [kind, content]."""
    match value:
        case Tensor():
            tensors[name] = _on_cpu(value)
            return ["tensor", name]
        case Mapping():
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"save_checkpoint: keys are str or int; {name} has {key!r}.")
            return ["dict", [[k, _flatten(v, f"{name}/{k}", tensors)] for k, v in value.items()]]
        case list() | tuple():
            nodes = [_flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
            return ["tuple" if isinstance(value, tuple) else "list", nodes]
        case None | bool() | int() | float() | str():
            return ["value", value]
        case _:
            raise TypeError(f"save_checkpoint: cannot save {name}, a {type(value).__name__}.")


def _unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    match node:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", items]:
            return {key: _unflatten(child, tensors) for key, child in items}
        case ["list", children]:
            return [_unflatten(child, tensors) for child in children]
        case ["tuple", children]:
            return tuple(_unflatten(child, tensors) for child in children)
        case ["value", value]:
            return value
        case _:
            raise ValueError(f"unknown node {node!r:.40}")
