"""Checks of arguments, with their error messages."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from mmvq_kernels.checks import check_below, is_cpu_readable
from mmvq_kernels.messages import message

__all__ = [
    "check_choice",
    "check_codes",
    "check_count_or_none",
    "check_features",
    "check_finite",
    "check_fit",
    "check_floating",
    "check_fraction",
    "check_indices",
    "check_instance",
    "check_int",
    "check_integers",
    "check_loss",
    "check_mask",
    "check_modalities",
    "check_not_negative",
    "check_number",
    "check_positive",
    "check_same_length",
    "check_vectors",
    "is_cpu_readable",
    "message",
    "without_padding",
]


def check_int(where: str, low: int, **values: int) -> None:
    """Check that each value is an int of at least `low`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            rule = f"{name} must be an int of at least {low}"
            hint = f"pass a Python int, {low} or more"
            raise ValueError(message(where, rule, hint=hint, **{name: value}))


def check_instance(where: str, kind: type, **values: object) -> None:
    """Check that each value is an instance of the class."""
    for name, value in values.items():
        if not isinstance(value, kind):
            rule = f"{name} must be a {kind.__name__}"
            hint = "pass the module itself: not the model around it, and before torch.compile"
            raise TypeError(message(where, rule, hint=hint, **{name: value}))


def check_number(where: str, low: float, high: float, **values: float) -> None:
    """Check that each value is a finite number in [low, high]."""
    for name, value in values.items():
        fits = isinstance(value, Real) and low <= value <= high  # a NaN fails too
        if not fits or math.isinf(value):
            span = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            rule = f"{name} must be a finite number {span}"
            raise ValueError(message(where, rule, hint=f"pass a number {span}", **{name: value}))


def check_fraction(where: str, **values: float) -> None:
    """Check that each value is a number in [0, 1]."""
    check_number(where, 0, 1, **values)


def check_positive(where: str, **values: float) -> None:
    """Check that each value is a number in [1e-6, 1e6]."""
    check_number(where, 1e-6, 1e6, **values)


def check_not_negative(where: str, **values: float) -> None:
    """Check that each value is a finite number of at least 0."""
    check_number(where, 0, math.inf, **values)


def check_count_or_none(where: str, **values: int | None) -> None:
    """Check that each value is an int of at least 1, or None."""
    check_int(where, 1, **{name: value for name, value in values.items() if value is not None})


def check_choice(
    where: str, choices: Collection[str], hint: str = "pass one of these", **values: object
) -> None:
    """Check that each value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            rule = f"{name} must be one of {listed}"
            raise ValueError(message(where, rule, hint=hint, **{name: value}))


def check_modalities(where: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """Return unique names that can be keys of an `nn.ModuleDict` and an `nn.ParameterDict`."""
    several = isinstance(modalities, Iterable) and not isinstance(modalities, str)
    names = tuple(modalities) if several else ()
    strings = all(isinstance(name, str) and name for name in names)
    if not names or not strings or len(set(names)) != len(names):
        rule = "modalities must be one or more names, each given once"
        hint = 'pass a tuple of strings such as ("audio", "video")'
        raise ValueError(message(where, rule, hint=hint, modalities=modalities))
    taken = nn.ModuleDict(), nn.ParameterDict()
    if any("." in name or any(hasattr(each, name) for each in taken) for name in names):
        rule = (
            "modalities name submodules and parameters: no dot, and no attribute of "
            "nn.ModuleDict or nn.ParameterDict"
        )
        hint = 'rename, for example, "left.arm" to "left_arm" or "type" to "kind"'
        raise ValueError(message(where, rule, hint=hint, modalities=modalities))
    return names


def check_features(
    where: str,
    features: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    *,
    dim: int | None = None,
    modalities: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return features `[B, T, D]` and masks `[B, T]`, in the sorted order of the names.

    Features `[B, D]` become T = 1. If some masks are given, the others become all True; otherwise
    masks are None. Features are not masked; see `without_padding`.
    """
    if not isinstance(features, Mapping) or not features:
        rule = "features must be a non-empty mapping from modality to tensor"
        hint = 'pass {"audio": z_audio, "video": z_video}'
        raise TypeError(message(where, rule, hint=hint, features=features))
    if not isinstance(masks, Mapping | None):
        rule = "masks must be a mapping from modality to mask, or None"
        hint = 'pass {"audio": mask_audio}; a modality without a mask is valid throughout'
        raise TypeError(message(where, rule, hint=hint, masks=masks))
    of_module = "use the names with which the module was built"
    _check_names(where, "features", features, modalities, hint=of_module)
    of_call = "give a mask only to a modality whose features come in the same call"
    _check_names(where, "masks", masks or {}, tuple(features), hint=of_call)
    z: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    for name in sorted(features):
        x = features[name]
        _check_feature(where, f"features[{name!r}]", x, dim)
        z[name] = x[:, None] if x.ndim == 2 else x
        if masks and name in masks:
            mask = masks[name]
            check_mask(where, f"masks[{name!r}]", mask, x)
            valid[name] = mask[:, None] if x.ndim == 2 else mask
        elif masks:
            valid[name] = torch.ones(z[name].shape[:2], dtype=torch.bool, device=x.device)
    devices = {name: x.device for name, x in z.items()}
    devices |= {} if device is None else {"the module": device}
    rule = "all features must be on one device, and the module too"
    _check_equal(where, rule, "move them with .to(device)", devices)
    rule = "all modalities must have the same batch size"
    hint = "pass clips of one batch; leave out a missing modality, or mask it"
    _check_equal(where, rule, hint, {name: x.shape[0] for name, x in z.items()})
    return z, valid or None


def without_padding(
    z: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Set masked features to 0, so that padding (including NaN) never reaches a result."""
    if masks is None:
        return dict(z)
    return {name: torch.where(masks[name][..., None], x, 0) for name, x in z.items()}


def check_loss(where: str, loss: Tensor) -> Tensor:
    """Check that a commitment returned a floating point scalar."""
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        rule = "the commitment must return a floating point scalar"
        raise ValueError(message(where, rule, hint="return loss.mean() or loss.sum()", loss=loss))
    return loss


def check_same_length(where: str, features: Mapping[str, Tensor], otherwise: str = "") -> None:
    """Check that all modalities have the same T."""
    rule = "all modalities must have the same number of segments T"
    hint = "resample them to the same time grid, or pad and mask the shorter" + otherwise
    _check_equal(where, rule, hint, {name: x.shape[1] for name, x in features.items()})


def check_floating(where: str, **tensors: Tensor) -> None:
    """Check that each value is a floating point tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            rule = f"{name} must be a floating point tensor"
            hint = "convert it with .float()"
            if not isinstance(x, Tensor):
                hint = "pass a tensor, as torch.from_numpy(...).float(), or leave it out"
            raise TypeError(message(where, rule, hint=hint, **{name: x}))


def check_vectors(where: str, x: Tensor, codebook: Tensor) -> None:
    """Check that `x` is `[..., D]`, floating point, and on the device of the codebook."""
    check_floating(where, x=x)
    D = codebook.shape[-1]
    if x.shape[-1:] != (D,) or x.device != codebook.device:
        rule = f"x must be [..., {D}], on the device of the codebook"
        hint = f"project its last dimension to {D}; move it with .to(device)"
        raise ValueError(message(where, rule, hint=hint, x=x, codebook=codebook))


def check_codes(where: str, codes: Tensor, counts: Tensor | None, *, like: Tensor) -> None:
    """Check that codes have the shape of `like`, and counts `[L]` or None."""
    check_floating(where, codes=codes)
    size, dim = like.shape
    counted = counts is None or (isinstance(counts, Tensor) and counts.shape == (size,))
    if codes.shape != like.shape or not counted:
        rule = f"codes must be [{size}, {dim}], and counts [{size}] or None"
        hint = "build the module with the dim and codebook_size of the codes"
        raise ValueError(message(where, rule, hint=hint, codes=codes, counts=counts))


def check_fit(where: str, fit: Tensor) -> None:
    """Check that all rows of codes and counts are valid, bool `[L]`. Synchronises."""
    if not bool(fit.all()):
        rule = "codes must be finite and below 1e15, and counts finite and not below 0"
        hint = "look for a damaged file or a division by a count of 0"
        raise ValueError(message(where, rule, hint=hint, invalid_rows=int((~fit).sum())))


def check_integers(where: str, hint: str, **tensors: Tensor) -> None:
    """Check that each value is a tensor of any integer dtype."""
    for name, x in tensors.items():
        kind = x.dtype if isinstance(x, Tensor) else torch.bool
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            rule = f"{name} must be an integer tensor"
            raise TypeError(message(where, rule, hint=hint, **{name: x}))


def check_indices(
    where: str, size: int, hint: str, *, signed: bool = True, **indices: Tensor
) -> None:
    """Check that values are int64 tensors below `size`, and not below 0 unless `signed`."""
    for name, x in indices.items():
        if not isinstance(x, Tensor) or x.dtype != torch.long:
            rule = f"{name} must be an int64 tensor"
            raise TypeError(message(where, rule, hint=hint, **{name: x}))
    check_below(where, size, hint, signed=signed, **indices)


def check_mask(where: str, name: str, mask: Tensor, x: Tensor) -> None:
    """Check that a mask is bool, `[B, T]` or `[B]` as its features, and on their device."""
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool
    if not fits or mask.shape != x.shape[:-1] or mask.device != x.device:
        rule = f"{name} must be a bool tensor shaped as its features without D, on their device"
        hint = "pass True where a segment is valid, False where it is padding"
        raise ValueError(message(where, rule, hint=hint, mask=mask, features=x))


def check_finite(
    where: str, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> None:
    """Check that valid values are finite. Only with MMVQ_CHECK=1, since it synchronises."""
    if os.environ.get("MMVQ_CHECK") != "1":
        return
    for name, x in without_padding(tensors, masks).items():
        if not bool(x.isfinite().all()):
            hint = "look for a division by zero or an overflow upstream"
            raise ValueError(message(where, f"{name} must be finite", hint=hint, **{name: x}))


def _check_equal(where: str, rule: str, hint: str, values: Mapping[str, object]) -> None:
    first, *rest = values.values()  # hashing them in a set would compile a graph for each size
    if any(value != first for value in rest):
        raise ValueError(message(where, rule, values, hint=hint))


def _check_names(
    where: str, what: str, given: Mapping[str, Tensor], known: Sequence[str] | None, *, hint: str
) -> None:
    unknown = [] if known is None else [name for name in given if name not in known]
    if unknown:
        listed = ", ".join(map(repr, known or ()))
        raise ValueError(
            message(where, f"{what} may name only {listed}", hint=hint, unknown=unknown)
        )


def _check_feature(where: str, name: str, x: Tensor, dim: int | None) -> None:
    check_floating(where, **{name: x})
    if x.ndim in (2, 3) and x.shape[-1] == (dim or x.shape[-1]):
        return
    D = dim or "D"
    if x.ndim not in (2, 3):
        hint = "reshape or pool it to batch, time and feature dimension"
    elif x.ndim == 3 and x.shape[1] == dim:
        hint = f"if it is [B, {D}, T], pass its transpose(1, 2)"
    else:
        hint = f"project its last dimension to {D}, or build the module with dim={x.shape[-1]}"
    raise ValueError(
        message(where, f"{name} must be [B, T, {D}] or [B, {D}]", hint=hint, **{name: x})
    )
