"""Training states and finished models on disk: safetensors, nothing pickled.

A checkpoint is ONE safetensors file: tensors as tensors, all else (numbers, texts, nesting) as
JSON in the file's own metadata. It is written whole beside its place and renamed, so an interrupted
write leaves the one before it untouched, and loading gives back every value to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        state: Any nesting of dicts (keys str or int), lists and tuples, with tensors, numbers,
            texts, booleans and None at the leaves: `state_dict()` of modules, optimizers and
            schedules, `random_state()`, counters, history.

    Raises:
        TypeError: Something else is at a leaf.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    write_atomic(path, save(tensors, metadata={_KEY: json.dumps(tree)}))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; tensors come back on the CPU.

    Raises:
        DataError: The file is missing, damaged, or not such a checkpoint.
    """
    tensors, metadata = _read(path)
    try:
        match _unflatten(json.loads(metadata[_KEY]), tensors):
            case dict(state):
                return state
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a checkpoint of this example ({error!r}).") from error
    raise DataError(f"{path}: not a checkpoint of this example.")


def save_model(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write model.safetensors, and config.json for people: the model carries its config too."""
    folder = Path(folder)
    content = {name: _on_cpu(x) for name, x in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    write_atomic(folder / "model.safetensors", save(content, metadata={"config": text}))
    write_atomic(folder / "config.json", text.encode())


def load_model(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config that `save_model` wrote, both from model.safetensors.

    Raises:
        DataError: The file is missing, damaged, or has no config.
    """
    path = Path(folder) / "model.safetensors"
    tensors, metadata = _read(path)
    try:
        match json.loads(metadata["config"]):
            case dict(config):
                return tensors, config
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a model of this example ({error!r}).") from error
    raise DataError(f"{path}: not a model of this example.")


def random_state() -> dict[str, Any]:
    """Where torch's global random generators stand, on the CPU and on every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except Exception as error:  # SafetensorError, OSError; torch's for a dtype it lacks
        raise DataError(f"{path}: damaged, or not a safetensors file ({error}).") from error


def _on_cpu(x: Tensor) -> Tensor:
    """A copy that shares memory with nothing and has no gaps, as the format asks for."""
    return x.detach().cpu().clone(memory_format=torch.contiguous_format)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of `value` into `tensors`; what is left is JSON: [kind, content]."""
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
            raise TypeError(f"save_checkpoint: cannot keep {name}, a {type(value).__name__}.")


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
