"""Finding the codebook of another library in a file, a module or a state_dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvq.checks import message

Source = str | PathLike[str] | nn.Module | Mapping[str, Any]


def read_file(where: str, path: str | PathLike[str], hint: str) -> Mapping[Any, Any]:
    """Read a file of `torch.save`, a `.safetensors` file, or a folder with model.safetensors.

    Only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has other objects, or is not a dict.
    """
    rule, path = "the file must be a whole checkpoint of tensors and plain containers", Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    safe = path.suffix == ".safetensors"
    if safe:
        from safetensors.torch import load
    with path.open("rb") as file:
        begins_with = repr(file.read(16))
        file.seek(0)
        try:
            if safe:
                content = load(file.read())
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise errors of many kinds
            got = {"path": str(path), "begins_with": begins_with, "error": type(error)}
            raise ValueError(message(where, rule, hint=hint, **got)) from error
    if not isinstance(content, Mapping):
        rule = "the file must hold a dict of parts"
        raise ValueError(message(where, rule, hint=hint, path=str(path), found=type(content)))
    return content


def find_codebook(
    where: str, source: Source, ending: str, hint: str
) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix of the one name that ends with `ending`, and all tensors by full name.

    The prefix is "" if there is no such name; the caller reports missing tensors.

    Raises:
        FileNotFoundError: `source` is the path of a file that does not exist.
        ValueError: the file cannot be read, several names end with `ending`, or a tensor of the
            codebook is not a plain one.
    """
    match source:
        case nn.Module():
            entries: Mapping[Any, Any] = source.state_dict()
        case str() | PathLike():
            entries = read_file(where, source, hint)
        case _:
            entries = source if isinstance(source, Mapping) else {}
    try:
        tensors = dict(_flatten(entries))
    except RecursionError as error:
        rule = "the source must not be nested so deep, or hold itself"
        raise ValueError(message(where, rule, hint=hint, source=type(source))) from error
    prefixes = [
        name.removesuffix(ending)
        for name in tensors
        if name == ending or name.endswith(f".{ending}")
    ]
    if len(prefixes) > 1:
        rule = f"there must be one codebook, and the source has {len(prefixes)}"
        hint = (
            "pass one submodule, or the part of one: {k.removeprefix(p): x for k, x in "
            "state.items() if k.startswith(p)} with its prefix p"
        )
        raise ValueError(message(where, rule, hint=hint, prefixes=sorted(prefixes)))
    prefix = prefixes[0] if prefixes else ""
    from_file = isinstance(source, str | PathLike)
    for name, x in tensors.items():
        odd = x.layout != torch.strided or x.is_meta or x.is_quantized
        # a file may claim any shape with a stride of 0
        if not odd and from_file:
            odd = x.numel() * x.element_size() > x.untyped_storage().nbytes()
        if odd and name.startswith(prefix):
            rule = f"{name} must be a plain tensor: whole, not sparse, quantized or on meta"
            raise ValueError(message(where, rule, hint=hint, found=x))
    return prefix, tensors


def is_floating(*tensors: Tensor | None) -> bool:
    """Whether each is a tensor of a dtype that codes can have."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return all(x is not None and x.dtype in kinds for x in tensors)


def _flatten(entries: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, x in entries.items():
        if isinstance(x, Tensor):
            yield f"{prefix}{name}", x
        elif isinstance(x, Mapping):
            yield from _flatten(x, f"{prefix}{name}.")
