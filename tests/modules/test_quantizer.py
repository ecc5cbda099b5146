"""The quantizer: what a batch gives, how it moves the codebook, and what leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantizers import NAMES, B, D, L, T, batch, some_masks, trained
from support import close, rounding, same, state, uniform
from torch import Tensor, nn

from mmvq import CodeUsage, MultiModalEMAQuantizer, functional, update_codebooks


@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
def test_one_snapshot_then_one_joint_step(partner: Any) -> None:
    """The whole of Eq. 7 from the references, with masks."""
    quantizer = trained(partner=partner, commitment=None, decay=0.9).double()
    z, masks = batch(torch.float64), some_masks()
    before = {name.removeprefix("ema_codebook."): x for name, x in state(quantizer).items()}
    quantized, indices, loss = quantizer(z, masks)
    values, chosen = [], []
    for m, x in z.items():
        own = functional.nearest_code_ref(x.flatten(0, 1), before["codes"]).view(B, T)
        assert torch.equal(indices[m], torch.where(masks[m], own, -1))
        code = torch.where(masks[m][..., None], before["codes"][own], 0)
        assert torch.equal(quantized[m], code)
        others = {b: z[b] for b in z if b != m}
        if partner == "attention":
            r = functional.cross_attend_ref(x, others, masks)
        else:
            r = x if partner == "none" else functional.aligned_partner(x, others, masks)
        values.append(((x + r) / 2)[masks[m]])
        chosen.append(own[masks[m]])
    counts, sums = functional.code_statistics_ref(torch.cat(values), torch.cat(chosen), L)
    old = {"decay": 0.9, "codes": before["codes"]}
    expected = functional.ema_update_ref(before["sums"], before["counts"], sums, counts, **old)
    # up to 45 vectors of entries below 1 into o, and a division by N >= 0.8
    atol = rounding(torch.float64, 50 + 50, 45)
    book = quantizer.ema_codebook
    for value, wanted in zip((book.codes, book.sums, book.counts), expected, strict=True):
        close(value, wanted, atol)
    assert loss == 0


@pytest.mark.parametrize("how", ["eval", "freeze", "no modality valid"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
def test_nothing_is_written(how: str, fresh: bool) -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES) if fresh else trained(reset_after=1)
    before = state(quantizer)
    if how == "eval":
        quantizer.eval()(batch())
    elif how == "freeze":
        quantizer(batch(), freeze=True)
    else:
        quantizer(batch(), {m: torch.zeros(B, T, dtype=torch.bool) for m in NAMES})
        before.pop("ema_codebook.steps")
    after = state(quantizer)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    if fresh:
        assert not quantizer.ema_codebook.initialized
        quantizer.train()(batch())
        assert quantizer.ema_codebook.initialized


@pytest.mark.parametrize("init", ["kmeans", "samples"])
@pytest.mark.parametrize("size", [7, 200], ids=["fewer codes than rows", "more"])
def test_first_codes_come_from_what_enters_o(init: Any, size: int) -> None:
    quantizer = MultiModalEMAQuantizer(
        D, size, NAMES, init=init, partner="none", update_from=["text"]
    )
    z = batch()
    z["text"][1, 2] = torch.nan
    masks = some_masks()
    quantizer.eval()(z, masks)
    quantizer.train()
    assert not quantizer.ema_codebook.initialized
    kept = z["text"][masks["text"] & z["text"].isfinite().all(-1)]
    draw = functional.kmeans if init == "kmeans" else functional.sample_rows
    first = draw(kept, size)
    quantized, indices, _ = quantizer(z, masks)
    good = masks["audio"]
    assert torch.equal(quantized["audio"][good], first[indices["audio"][good]])
    assert quantizer.codebook.isfinite().all()
    if size > len(kept):
        assert first.unique(dim=0).shape[0] == size


def test_rows_that_are_not_finite_show_but_do_not_enter() -> None:
    quantizer, clean = trained(), trained()
    z, masks = batch(), {m: torch.ones(B, T, dtype=torch.bool) for m in NAMES}
    z["audio"][0, 1, 2], z["video"][2, 0] = torch.nan, torch.inf
    masks["audio"][0, 1] = masks["video"][2, 0] = False
    quantized, indices, loss = quantizer(z)
    clean({m: torch.where(masks[m][..., None], x, 0) for m, x in z.items()}, masks)
    assert same(state(quantizer), state(clean))
    assert not loss.isfinite()
    assert quantized["audio"][0, 1].isnan().any()
    assert indices["audio"][0, 1] == indices["video"][2, 0] == 0
    assert all(quantized[m][masks[m]].isfinite().all() for m in NAMES)


def test_without_time() -> None:
    quantizer, timed = trained(), trained()
    z, masks = (
        {m: x[:, 0] for m, x in batch().items()},
        {"audio": torch.tensor([True, False, True])},
    )
    quantized, indices, loss = quantizer(z, masks)
    expected = timed({m: x[:, None] for m, x in z.items()}, {"audio": masks["audio"][:, None]})
    assert torch.equal(loss, expected.loss)
    for m in NAMES:
        assert quantized[m].shape == (B, D)
        assert indices[m].shape == (B,)
        assert torch.equal(quantized[m], expected.quantized[m][:, 0])
        assert torch.equal(indices[m], expected.indices[m][:, 0])
    assert same(state(quantizer), state(timed))
    assert indices["audio"][1] == -1


def test_any_subset_and_lengths_of_their_own() -> None:
    quantizer = trained(commitment=None)
    for names in (("audio",), ("text", "video"), NAMES):
        z = {m: uniform(B, 2 + i, D, dtype=torch.float32) for i, m in enumerate(names)}
        out = quantizer(z)
        assert set(out.quantized) == set(names)
        assert all(out.indices[m].shape == x.shape[:2] for m, x in z.items())
    alone = quantizer.eval()({"video": batch()["video"]})
    assert torch.equal(alone.indices["video"], quantizer.encode(batch()["video"]))


@pytest.mark.parametrize("names", [("audio",), NAMES], ids=len)
def test_an_empty_batch_is_harmless(names: tuple[str, ...]) -> None:
    quantizer = trained()
    before = state(quantizer)
    z = {m: x[:0].requires_grad_() for m, x in batch(names=names).items()}
    quantized, indices, loss = quantizer(z)
    assert all(q.shape == (0, T, D) for q in quantized.values())
    assert all(i.shape == (0, T) for i in indices.values())
    assert loss == 0
    loss.backward()
    after = state(quantizer)
    assert all(torch.equal(after[k], x) for k, x in before.items() if not k.endswith("steps"))


def test_gradients_of_both_kinds() -> None:
    seed = uniform(B, T, D, dtype=torch.float32, seed=50)
    for gradient in ("straight_through", "rotation"):
        quantizer = trained(gradient=gradient, commitment=None).eval()
        z, masks = batch()["audio"].requires_grad_(), {"audio": some_masks()["audio"]}
        q, i, _ = quantizer({"audio": z}, masks)
        (grad,) = torch.autograd.grad(q["audio"], z, seed)
        kept = masks["audio"]
        assert (grad[~kept] == 0).all()
        if gradient == "straight_through":
            expected = seed
        else:
            leaf = z.detach().requires_grad_()
            turned = functional.rotate(leaf, quantizer.decode(i["audio"]))
            (expected,) = torch.autograd.grad(turned, leaf, seed)
        assert torch.equal(grad[kept], expected[kept])


def test_manual_updates_wait() -> None:
    manual, auto = trained(update="manual"), trained()
    start = state(manual)
    manual.load_state_dict(auto.state_dict())
    manual.update_codebook()  # what the two batches of `trained` left waiting
    assert not same(state(manual), start)
    manual.load_state_dict(auto.state_dict())
    before = state(manual)
    manual(batch())
    assert same(state(manual), before)
    auto(batch())
    update_codebooks([nn.ModuleList([manual])])
    assert same(state(manual), state(auto))
    auto.update_codebook()
    manual.update_codebook()
    assert same(state(manual), state(auto))


def test_encode_and_decode() -> None:
    quantizer = trained()
    indices = torch.arange(L).view(2, 2, 2)
    codes = quantizer.decode(indices)
    assert torch.equal(codes, quantizer.codebook[indices])
    assert torch.equal(quantizer.encode(codes), indices)
    assert torch.equal(quantizer.decode(torch.tensor([[-1, 3]]))[0, 0], torch.zeros(D))
    assert torch.equal(quantizer.decode(torch.tensor(3)), quantizer.codebook[3])
    assert quantizer.encode(codes.bfloat16()).shape == (2, 2, 2)
    with pytest.raises(IndexError):
        quantizer.decode(torch.tensor([L]))
    read = quantizer.codebook
    kept = read.clone()
    quantizer(batch())
    assert torch.equal(read, kept)
    assert not torch.equal(read, quantizer.codebook)
    assert quantizer.out_dim == D


def test_usage_counts_valid_finite_training_vectors() -> None:
    quantizer, masks, z = trained(), some_masks(), batch()
    quantizer.usage(reset=True)
    z["text"][0, 0] = torch.nan
    masks["text"][0, 0] = True
    indices = quantizer(z, masks).indices
    quantizer.eval()(z)
    quantizer.train()(z, freeze=True)
    usage = quantizer.usage(reset=True)
    assert isinstance(usage, CodeUsage)
    assert list(usage.counts) == list(NAMES)
    for m in NAMES:
        kept = indices[m][masks[m] & z[m].isfinite().all(-1)]
        assert torch.equal(usage.counts[m], torch.bincount(kept, minlength=L))
    empty = quantizer.usage()
    assert empty.dead.all()
    assert not empty.shared.any()
    assert all(p == 0 for p in empty.perplexity.values())
    assert usage.counts["text"].sum() == masks["text"].sum() - 1  # what was read stays


def test_the_first_batch_with_something_valid_starts_the_codebook() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    before = state(quantizer)
    nothing = {m: torch.zeros(B, T, dtype=torch.bool) for m in NAMES}
    quantizer(batch(seed=1), nothing)
    after = state(quantizer)
    assert after.pop("ema_codebook.steps") == 1
    del before["ema_codebook.steps"]
    assert same(before, after)
    quantizer(batch(seed=2))
    twin = MultiModalEMAQuantizer(D, L, NAMES)
    twin(batch(seed=2))
    assert torch.equal(quantizer.codebook, twin.codebook)
    assert quantizer.ema_codebook.initialized


def test_a_forward_that_fails_leaves_the_codebook_as_it_was() -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("no loss today")

    ragged = batch(names=NAMES[:2]) | {"text": uniform(B, T + 2, D, dtype=torch.float32)}
    before = state(trained())
    for commitment, z, error in (("default", ragged, ValueError), (failing, batch(), RuntimeError)):
        quantizer = MultiModalEMAQuantizer(D, L, NAMES, commitment=commitment)
        quantizer.load_state_dict(before)
        with pytest.raises(error):
            quantizer(z)
        quantizer.update_codebook()  # nor was anything accumulated
        assert same(before, state(quantizer))
