"""Partners: `cross_attend` and `aligned_partner` against loops.

ATOL: entries in [-1, 1] and D = 4. Both kinds of scores are at most 2 in size, D / sqrt(D) and
sqrt(D) * 1. A dot product is off by at most (D + 2) roundings of 2; two unit lengths add (D + 2)
roundings of 2 between them. A weight is then off by twice that and S roundings more, and so is the
output, whose entries are at most 1: 2 * 2 * 2 (D + 2) + 2 S < 65 roundings; masks and the mean over
modalities add less than 10.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import DTYPES, bools, close, peak_growth, rounding, strided, uniform
from torch import Tensor

from mmvq.functional import aligned_partner, cross_attend, cross_attend_ref

B, T, D = 3, 5, 4
TEMPERATURES = (None, D**0.5, 0.7)
ROUNDINGS = 75
Tensors = dict[str, Tensor]
Partner = Callable[[Tensor, Tensors, Tensors], Tensor]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensors, Tensors]:
    """Queries, two other modalities of 5 and 7 segments, masks; clip 1 has no text, clip 2 none."""
    others = {"text": uniform(B, 7, D, dtype=dtype, seed=1), "video": uniform(B, T, D, dtype=dtype)}
    masks = {name: bools(B, x.shape[1], seed=3) for name, x in others.items()}
    masks["video"][:2, 0] = True
    masks["text"][0, 0] = True
    masks["text"][1:], masks["video"][2] = False, False
    return uniform(B, T, D, dtype=dtype, seed=2), others, masks


def aligned_loop(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
    r = z.clone()
    for b in range(len(z)):
        for t in range(z.shape[1]):
            there = [x[b, t] for name, x in others.items() if masks[name][b, t]]
            if there:
                r[b, t] = torch.stack(there).mean(0)
    return r


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equals_the_loop(dtype: torch.dtype, temperature: float | None) -> None:
    z, others, masks = batch(dtype)
    wide = {m: x.double() for m, x in others.items()}
    expected = cross_attend_ref(z.double(), wide, masks, temperature=temperature)
    r = cross_attend(z, others, masks, temperature=temperature)
    assert r.dtype == dtype
    close(r, expected, rounding(dtype, ROUNDINGS, max(1, 2 / (temperature or 2))))


def test_the_default_is_the_papers_formula_for_vectors_of_length_sqrt_d() -> None:
    z, others, masks = batch()
    z, others["video"], others["text"] = (
        D**0.5 * torch.nn.functional.normalize(x, dim=-1)
        for x in (z, others["video"], others["text"])
    )
    paper = cross_attend(z, others, masks, temperature=D**0.5)
    close(cross_attend(z, others, masks), paper, rounding(z.dtype, ROUNDINGS, 2))
    assert (cross_attend(2 * z, others, masks, temperature=D**0.5) - paper).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_the_default_does_not_depend_on_the_scale(scale: float) -> None:
    """1e15 is the largest element that enters the state; queries and keys may differ in scale."""
    z, others, masks = batch(torch.float32)
    expected = cross_attend(z, others, masks)
    # the loss of a square of (1e-18 / 2)^2 to denormal numbers is below eps
    atol = rounding(z.dtype, ROUNDINGS)
    close(cross_attend(z * scale, others, masks)[:2], expected[:2], atol)
    scaled = {m: x * scale for m, x in others.items()}
    close(cross_attend(z * scale, scaled, masks)[:2] / scale, expected[:2], atol)


def test_alike_vectors_find_each_other_at_unit_length() -> None:
    """At D = 256 the paper's scores differ by 1/16: its r is nearly the mean of the clip."""
    width, count = 256, 10
    z = torch.eye(count, width)[None]
    valid = torch.ones(1, count, dtype=torch.bool)
    order = torch.arange(count).flip(0)
    r = cross_attend(z, {"b": z[:, order]}, {"b": valid})
    own = 1 / (1 + (count - 1) * torch.exp(torch.tensor(-16.0)))  # weight of the vector itself
    close(r.diagonal(dim1=1, dim2=2), own.expand(1, count), rounding(z.dtype, 16 * 4))
    paper = cross_attend(z, {"b": z[:, order]}, {"b": valid}, temperature=width**0.5)
    assert (paper - z.mean(1, keepdim=True)).abs().max() < 0.01


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_vectors_have_cosine_0_and_finite_gradients(temperature: float | None) -> None:
    z, keys = torch.zeros(1, 2, D), torch.stack([torch.ones(D), torch.zeros(D)])[None]
    inputs = [x.requires_grad_() for x in (z, keys)]
    r = cross_attend(
        z, {"b": keys}, {"b": torch.ones(1, 2, dtype=torch.bool)}, temperature=temperature
    )
    close(r, torch.full((1, 2, D), 0.5), 0)
    r.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize(
    ("length", "masked", "backward"),
    [(16384, False, False), (16384, True, False), (4096, True, True)],
)
def test_memory_is_linear_in_the_length(length: int, masked: bool, backward: bool) -> None:
    """20 tensors `[T, D]` of 4 MiB (1 MiB); all scores would be 1,024 MiB (64 MiB)."""
    setup = (
        f"z, other = torch.randn(2, 1, {length}, 64)\n"
        f"other.requires_grad_({backward})\n"
        f"mask = torch.rand(1, {length}) > 0.3 * {masked}\n"
        "few = {'b': other[:, :64]}, {'b': mask[:, :64]}\n"
        "r = mmvq.functional.cross_attend(z[:, :64], *few)\n"
        f"if {backward}: r.sum().backward()"
    )
    call = "r = mmvq.functional.cross_attend(z, {'b': other}, {'b': mask})"
    call += "\nr.sum().backward()" * backward
    assert peak_growth(setup, call) < 20 * length * 64 * 4 / 2**20


def test_lengths_may_differ_and_be_zero() -> None:
    z, others, masks = batch()
    empty = {m: x[:, :0] for m, x in others.items()}, {m: x[:, :0] for m, x in masks.items()}
    assert torch.equal(cross_attend(z, *empty), z)
    assert cross_attend(z[:, :0], others, masks).shape == (B, 0, D)
    with_text = {**others, "video": empty[0]["video"]}, {**masks, "video": empty[1]["video"]}
    alone = {"text": others["text"]}, {"text": masks["text"]}
    close(cross_attend(z, *with_text), cross_attend(z, *alone), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_equals_the_loop(dtype: torch.dtype) -> None:
    z, others, masks = batch(dtype)
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    expected = aligned_loop(z.double(), {m: x.double() for m, x in others.items()}, masks)
    r = aligned_partner(z, others, masks)
    assert r.dtype == dtype
    close(r, expected, rounding(dtype, 2))  # a sum of two and a division


@pytest.mark.parametrize("partner", [cross_attend, aligned_partner])
def test_padding_is_never_read(partner: Partner) -> None:
    z, others, masks = batch()
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    spoilt = {m: torch.where(masks[m][..., None], x, torch.nan) for m, x in others.items()}
    assert torch.equal(partner(z, spoilt, masks), partner(z, others, masks))


@pytest.mark.parametrize("partner", [cross_attend, aligned_partner])
def test_alone_the_partner_is_the_vector_itself(partner: Partner) -> None:
    z, others, masks = batch()
    assert torch.equal(partner(z, {}, {}), z)
    nothing = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    others["text"], nothing["text"] = others["text"][:, :T], nothing["text"][:, :T]
    assert torch.equal(partner(z, others, nothing), z)


@pytest.mark.parametrize("partner", [cross_attend, aligned_partner])
def test_empty_batch_and_strides(partner: Partner) -> None:
    z, others, masks = batch()
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    loose = {m: strided(x) for m, x in others.items()}
    close(
        partner(strided(z), loose, masks), partner(z, others, masks), rounding(z.dtype, ROUNDINGS)
    )
    none = {m: x[:0] for m, x in others.items()}, {m: x[:0] for m, x in masks.items()}
    assert partner(z[:0], *none).shape == (0, T, D)


def test_one_key_is_the_answer_and_equal_keys_average() -> None:
    z = uniform(2, 3, D)
    key = uniform(2, 1, D, seed=1)
    valid = torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(cross_attend(z, {"b": key}, {"b": valid}), key.expand(2, 3, D))
    orthogonal = torch.zeros(2, 1, D, dtype=z.dtype)  # every logit 0: the mean of the values
    keys = uniform(2, 6, D, seed=2)
    r = cross_attend(orthogonal, {"b": keys}, {"b": torch.ones(2, 6, dtype=torch.bool)})
    close(r, keys.mean(1, keepdim=True), rounding(z.dtype, ROUNDINGS))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_attention_gradient(temperature: float | None) -> None:
    z, others, masks = batch()

    def attend(q: Tensor, *keys: Tensor) -> Tensor:
        given = dict(zip(others, keys, strict=True))
        return cross_attend(q, given, masks, temperature=temperature)

    inputs = [x.requires_grad_() for x in (z, *others.values())]
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_attention_in_one_graph(temperature: float | None) -> None:
    z, others, masks = batch()

    def attend(q: Tensor) -> Tensor:
        return cross_attend(q, others, masks, temperature=temperature)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return attend(q)

    for graph in (
        torch.compile(attend, fullgraph=True, backend="aot_eager"),
        torch.export.export(Attend(), (z,)).module(),
    ):
        close(graph(z), attend(z), rounding(z.dtype, ROUNDINGS))


def test_attention_is_twice_differentiable_within_a_transform() -> None:
    """Curvature of |r|^2 as autograd has it from the reference."""
    z, others, masks = batch()

    def energy(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda q: attend(q, others, masks)[0].square().sum()

    found = torch.func.jacrev(torch.func.jacrev(energy(cross_attend)))(z)
    expected = torch.autograd.functional.hessian(energy(cross_attend_ref), z)
    assert expected.abs().max() > 0.1
    # two derivatives double each factor's error, twice, in sums of B T D terms
    close(found, expected, rounding(z.dtype, 16 * ROUNDINGS * B * T * D))
