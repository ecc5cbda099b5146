"""The one home of argument checks and their messages."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from mmvq_kernels.messages import message

__all__ = [
    "check_choice",
    "check_features",
    "check_finite",
    "check_int",
    "check_modalities",
    "check_number",
    "check_same_length",
    "message",
]


def check_int(where: str, low: int, **values: int) -> None:
    """Each value is an int >= low."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(
                message(
                    where,
                    f"{name} must be an int of at least {low}",
                    hint=f"pass {low} or more",
                    **{name: value},
                )
            )


def check_number(where: str, low: float, high: float, **values: float) -> None:
    """Each value is a finite number in [low, high]."""
    for name, value in values.items():
        fits = isinstance(value, Real) and low <= value <= high  # a NaN fails too
        if not fits or math.isinf(value):
            span = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            rule = f"{name} must be a finite number {span}"
            raise ValueError(message(where, rule, hint=f"pass a number {span}", **{name: value}))


def check_choice(
    where: str, choices: Collection[str], hint: str = "pick one", **values: object
) -> None:
    """Each value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            rule = f"{name} must be one of {listed}"
            raise ValueError(message(where, rule, hint=hint, **{name: value}))


def check_modalities(where: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """One or more names, each once, that can be keys of an `nn.ModuleDict`."""
    names = tuple(modalities)
    strings = not isinstance(modalities, str) and all(isinstance(n, str) and n for n in names)
    if strings and any("." in name or hasattr(nn.ModuleDict, name) for name in names):
        raise ValueError(
            message(
                where,
                "a modality's name names parameters: no dot, and no attribute of nn.ModuleDict",
                hint='rename it, "left.arm" to "left_arm" or "type" to "kind"',
                modalities=modalities,
            )
        )
    if not strings or not names or len(set(names)) != len(names):
        raise ValueError(
            message(
                where,
                "modalities must be one or more names, each given once",
                hint='pass a tuple of strings such as ("audio", "video")',
                modalities=modalities,
            )
        )
    return names


def check_features(
    where: str,
    features: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    *,
    dim: int | None = None,
    modalities: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features as `[B, T, D]` and masks as bool `[B, T]`, in the sorted order of the names.

    `[B, D]` becomes T = 1; a missing mask becomes all True; features under a False are set to 0, so
    that nothing a user leaves in the padding (NaN included) can reach a result.
    """
    if not isinstance(features, Mapping) or not features:
        raise TypeError(
            message(
                where,
                "features must be a non-empty mapping from modality to tensor",
                hint='pass {"audio": z_audio, "video": z_video}',
                features=features if features == {} else type(features),
            )
        )
    masks = {} if masks is None else masks
    if not isinstance(masks, Mapping):
        raise TypeError(
            message(
                where,
                "masks must be a mapping from modality to mask, or None",
                hint='pass {"audio": mask_audio}; a modality without a mask is valid throughout',
                masks=type(masks),
            )
        )
    of_module = "use the names that the module was built with"
    _check_names(where, "features", features, modalities, hint=of_module)
    of_call = "give a mask only to a modality whose features come in the same call"
    _check_names(where, "masks", masks, tuple(features), hint=of_call)
    z: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    for name in sorted(features):
        x = _check_feature(where, name, features[name], dim)
        mask = masks.get(name)
        if mask is not None:
            _check_mask(where, name, mask, x)
            x = torch.where(mask[..., None], x, 0)
        flat = x.ndim == 2
        z[name] = x[:, None] if flat else x
        if mask is None:
            valid[name] = torch.ones(z[name].shape[:2], dtype=torch.bool, device=x.device)
        else:
            valid[name] = mask[:, None] if flat else mask
    batches = {name: x.shape[0] for name, x in z.items()}
    if _differ(batches):
        raise ValueError(
            message(
                where,
                "all modalities must have the same batch size",
                hint="pass clips of one batch; leave out a modality that is missing, or mask it",
                **batches,
            )
        )
    return z, valid


def check_same_length(where: str, features: Mapping[str, Tensor]) -> None:
    """All modalities have the same T."""
    lengths = {name: x.shape[1] for name, x in features.items()}
    if _differ(lengths):
        raise ValueError(
            message(
                where,
                "all modalities must have the same number of segments T",
                hint="resample them to one time grid, or pad and mask the shorter",
                **lengths,
            )
        )


def check_finite(where: str, **tensors: Tensor) -> None:
    """Values are finite; looked at only under MMVQ_CHECK=1, since it waits for the device."""
    if os.environ.get("MMVQ_CHECK") != "1":
        return
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            raise ValueError(
                message(
                    where,
                    f"{name} must be finite",
                    hint="look for a division by zero or an overflow upstream",
                    **{name: x},
                )
            )


def _differ(sizes: Mapping[str, int]) -> bool:
    first, *rest = sizes.values()  # a set would hash them, which compiles a graph for each size
    return any(size != first for size in rest)


def _check_names(
    where: str, what: str, given: Mapping[str, Tensor], known: Sequence[str] | None, *, hint: str
) -> None:
    unknown = [] if known is None else [name for name in given if name not in known]
    if unknown:
        listed = ", ".join(map(repr, known or ()))
        raise ValueError(
            message(where, f"{what} may name only {listed}", hint=hint, unknown=unknown)
        )


def _check_feature(where: str, name: str, x: Tensor, dim: int | None) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            message(
                where,
                f"features[{name!r}] must be a floating point tensor",
                hint="convert with .float(), or torch.from_numpy(...).float()",
                **{name: x if isinstance(x, Tensor) else type(x)},
            )
        )
    if x.ndim not in (2, 3) or (dim is not None and x.shape[-1] != dim):
        width = "D" if dim is None else str(dim)
        raise ValueError(
            message(
                where,
                f"features[{name!r}] must be [B, T, {width}] or [B, {width}]",
                hint=f"project the last dimension to {width}",
                **{name: x},
            )
        )
    return x


def _check_mask(where: str, name: str, mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        raise ValueError(
            message(
                where,
                f"masks[{name!r}] must be a bool tensor shaped as its features without D",
                hint="pass True where a segment is valid, False where it is padding",
                mask=mask if isinstance(mask, Tensor) else type(mask),
                features=x,
            )
        )
