"""What users build from the parts: residual levels, tied codebooks, partners of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from properties.strategies import EPS, NAMES, Draw, Tensors, assert_same_bits, draws, pending, start
from support import close, state
from torch import Tensor, nn

from mmvq import (
    CrossModalCommitmentLoss,
    EMACodebook,
    MultiModalEMAQuantizer,
    QuantizerOutput,
    update_codebooks,
)
from mmvq.functional import ema_update_ref, straight_through

every_number = pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES])


class TwoLevels(nn.Module):
    """A residual quantizer: the second level quantizes what the first leaves."""

    def __init__(self, dim: int, size: int, names: Sequence[str], init: Any = "kmeans") -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            MultiModalEMAQuantizer(dim, size, names, init=init, commitment=None, update="manual")
            for _ in range(2)
        )
        self.commitment = CrossModalCommitmentLoss()

    def forward(self, z: Tensors) -> QuantizerOutput:
        rest = {name: x.detach() for name, x in z.items()}
        indices: dict[str, list[Tensor]] = {name: [] for name in z}
        for level in self.levels:
            quantized, chosen, loss = level(rest)
            assert loss == 0
            assert not loss.requires_grad
            rest = {name: x - quantized[name] for name, x in rest.items()}
            for name, index in chosen.items():
                indices[name].append(index)
        codes = {name: x.detach() - rest[name] for name, x in z.items()}
        return QuantizerOutput(
            {name: straight_through(z[name], codes[name]) for name in z},
            {name: torch.stack(levels, -1) for name, levels in indices.items()},
            self.commitment(z, codes),
        )

    def decode(self, indices: Tensor) -> Tensor:
        codes = [level.decode(i) for level, i in zip(self.levels, indices.unbind(-1), strict=True)]
        return torch.stack(codes).sum(0)


@every_number
@given(draw=draws())
def test_two_quantizers_make_a_residual_one(names: Sequence[str], draw: Draw) -> None:
    module = TwoLevels(draw.D, draw.L, names, init="uniform").double()
    for step in range(3):
        z = {name: x.requires_grad_() for name, x in draw.features(names, step).items()}
        out = module(z)
        for name in names:
            assert out.indices[name].shape == (draw.B, draw.T, 2)
            # z - (z - e1 - e2) against e1 + e2: four roundings of vectors like z.
            atol = 10 * EPS * float(1 + z[name].detach().abs().max())
            close(out.quantized[name].detach(), module.decode(out.indices[name]), atol)
            (found,) = torch.autograd.grad(out.quantized[name].sum(), z[name], retain_graph=True)
            assert torch.equal(found, torch.ones_like(found))
            (pull,) = torch.autograd.grad(out.loss, z[name], retain_graph=True)
            assert pull.any()
        before = [level.codebook for level in module.levels]
        update_codebooks([module])
        for level, old in zip(module.levels, before, strict=True):
            assert not torch.equal(level.codebook, old)


def test_the_second_level_refines_the_first() -> None:
    z = Draw(B=5, T=40, D=3, L=1, strided=True, seed=0).features(NAMES)
    module = TwoLevels(3, 13, NAMES)
    for _ in range(20):
        module(z)
        update_codebooks([module])
    both, first = module(z).quantized, module.levels[0](z).quantized
    for name, x in z.items():
        assert (x - both[name]).square().mean() < 0.5 * (x - first[name]).square().mean()


@every_number
@given(draw=draws())
def test_codebooks_tied_by_index(names: Sequence[str], draw: Draw) -> None:
    """One codebook for each modality; each takes the vectors of the next at the first's indices."""
    books = {name: EMACodebook(draw.D, draw.L, decay=0.9) for name in names}
    for i, book in enumerate(books.values()):
        start(book, draw.codes() + i)
    z = {name: x.reshape(-1, draw.D) for name, x in draw.features(names).items()}
    index = books[names[0]].search(z[names[0]])
    counts = torch.bincount(index, minlength=draw.L).double()
    for name, partner in zip(names, (*names[1:], names[0]), strict=True):
        before = state(books[name])
        books[name].accumulate(z[partner], index)
        assert_same_bits(state(books[name]), before)
        books[name].apply()
        sums = torch.zeros_like(before["sums"]).index_add(0, index, z[partner])
        old = {"decay": 0.9, "codes": before["codes"]}
        expected = ema_update_ref(before["sums"], before["counts"], sums, counts, **old)
        atol = draw.slack(z)  # for rows [n, D], which it counts as [B, T]
        close(books[name].weight, expected[0], atol)
        close(books[name].sums, expected[1], atol)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])  # alone, there is nobody to ask about
@given(draw=draws())
def test_a_callable_is_given_the_others_and_what_is_fit_of_them(
    names: Sequence[str], draw: Draw
) -> None:
    """Once for each modality; what it returns enters with weight w."""
    calls: list[tuple[Tensor, Tensors, Tensors]] = []

    def record(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
        calls.append((z, others, masks))
        return 5 * z

    module = draw.quantizer(names, partner=record, partner_weight=0.25, update="manual")
    plain = draw.quantizer(names, partner="none", update="manual")
    z, masks = draw.features(names), draw.masks(names)
    spoilt = {name: torch.where(masks[name][..., None], x, torch.nan) for name, x in z.items()}
    module(spoilt)
    plain(z, masks)
    assert len(calls) == len(names)
    for name, (x, others, valid) in zip(sorted(names), calls, strict=True):
        assert_same_bits(others, {n: torch.where(masks[n][..., None], z[n], 0) for n in others})
        assert set(others) == set(valid) == set(names) - {name}
        assert_same_bits(valid, {n: masks[n] for n in others})
        assert torch.equal(x, torch.where(masks[name][..., None], z[name], 0))
    (_, counts, sums), (_, n, wanted) = pending(module), pending(plain)
    assert torch.equal(counts, n)
    close(sums, 2 * wanted, 5 * draw.slack(z))  # (1 - w) z + w 5 z = 2 z
