"""The one home of argument checks and their messages."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mmvq_kernels.messages import message

__all__ = [
    "check_choice",
    "check_features",
    "check_finite",
    "check_modalities",
    "check_number",
    "check_positive_int",
    "check_same_length",
    "message",
]


def check_positive_int(where: str, **values: int) -> None:
    """Each value is an int >= 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                message(
                    where, f"{name} must be a positive int", hint="pass 1 or more", **{name: value}
                )
            )


def check_number(where: str, low: float, high: float, **values: float) -> None:
    """Each value is a number in [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:  # a NaN fails too
            raise ValueError(
                message(
                    where,
                    f"{name} must lie in [{low:g}, {high:g}]",
                    hint=f"pass a number from {low:g} to {high:g}",
                    **{name: value},
                )
            )


def check_choice(where: str, choices: Collection[str], **values: object) -> None:
    """Each value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(
                message(where, f"{name} must be one of {listed}", hint="pick one", **{name: value})
            )


def check_modalities(where: str, modalities: Sequence[str], at_least: int = 1) -> tuple[str, ...]:
    """Distinct, non-empty names."""
    names = tuple(modalities)
    strings = not isinstance(modalities, str) and all(isinstance(n, str) and n for n in names)
    if not strings or len(set(names)) != len(names) or len(names) < at_least:
        raise ValueError(
            message(
                where,
                f"modalities must be at least {at_least} distinct names",
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
                features=type(features).__name__,
            )
        )
    _check_names(where, features, modalities, "features")
    _check_names(where, masks or {}, tuple(features), "masks")
    z: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    for name in sorted(features):
        x = _check_feature(where, name, features[name], dim)
        mask = (masks or {}).get(name)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
                raise ValueError(
                    message(
                        where,
                        f"masks[{name!r}] must be bool and shaped as its features without D",
                        hint="pass True where a segment is valid, False where it is padding",
                        mask=mask,
                        features=x,
                    )
                )
            x = torch.where(mask[..., None], x, 0)
        flat = x.ndim == 2
        z[name] = x[:, None] if flat else x
        if mask is None:
            valid[name] = torch.ones(z[name].shape[:2], dtype=torch.bool, device=x.device)
        else:
            valid[name] = mask[:, None] if flat else mask
    batches = {name: x.shape[0] for name, x in z.items()}
    if len(set(batches.values())) > 1:
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
    if len(set(lengths.values())) > 1:
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


def _check_names(
    where: str, given: Mapping[str, Tensor], known: Sequence[str] | None, what: str
) -> None:
    unknown = [] if known is None else [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            message(
                where,
                f"{what} may name only {', '.join(map(repr, known or ()))}",
                hint="use the names that the module was built with",
                unknown=unknown,
            )
        )


def _check_feature(where: str, name: str, x: Tensor, dim: int | None) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            message(
                where,
                f"features[{name!r}] must be a floating point tensor",
                hint="convert with .float()",
                **{name: x if isinstance(x, Tensor) else type(x).__name__},
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
