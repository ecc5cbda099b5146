"""Argument checks of the modules in this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmvq.checks import message


def modality_names(where: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities as a tuple, after a check that they are two or three names."""
    names = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if len(names) not in (2, 3) or len(set(names)) != len(names):
        rule = "modalities must be two or three different names"
        hint = "the release has no other case; mmvq's own modules take any number"
        raise ValueError(message(where, rule, hint=hint, modalities=modalities))
    return names


def sequences(
    where: str, features: Mapping[str, Tensor], modalities: Sequence[str], dim: int
) -> list[Tensor]:
    """Return the features in the order of `modalities`, all of one shape `[B, T, dim]`."""
    given = features if isinstance(features, Mapping) else {}
    shapes = {x.shape for x in given.values()}
    if set(given) != set(modalities) or [(len(s), s[-1]) for s in shapes] != [(3, dim)]:
        rule = f"features must hold a tensor [B, T, {dim}] for each of {modalities}, of one shape"
        hint = "the release takes complete sets only; cut all modalities to the same T"
        raise ValueError(message(where, rule, hint=hint, features=features))
    return [given[name] for name in modalities]
