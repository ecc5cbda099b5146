"""Argument checks of the modules in this package and their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def modality_names(where: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """The modalities as a tuple; ValueError unless they are two or three different names."""
    if len(modalities) not in (2, 3) or len(set(modalities)) != len(modalities):
        raise ValueError(
            f"{where}: modalities must be two or three different names.\n"
            f"  modalities: {tuple(modalities)}\n"
            "  Hint: the release has no other case; mmvq's own modules take any number."
        )
    return tuple(modalities)


def sequences(
    where: str, features: Mapping[str, Tensor], modalities: Sequence[str], dim: int
) -> list[Tensor]:
    """The features in the order of `modalities`; ValueError unless all are [B, T, dim], alike."""
    shapes = {name: tuple(x.shape) for name, x in features.items()}
    alike = len(set(shapes.values())) == 1 and all(len(s) == 3 for s in shapes.values())
    if set(shapes) != set(modalities) or not alike or any(s[2] != dim for s in shapes.values()):
        raise ValueError(
            f"{where}: features must hold one [B, T, {dim}] tensor for each of {modalities}, all "
            f"of one shape.\n  features: {shapes}\n"
            "  Hint: the release takes complete sets only; cut all modalities to the same T."
        )
    return [features[name] for name in modalities]
