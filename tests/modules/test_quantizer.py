"""The quantizer: what a batch gives, how it moves the codebook, and what leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantizers import NAMES, B, D, L, T, batch, some_masks, trained
from support import same, state, uniform
from torch import Tensor, nn

from mmvq import CodeUsage, MultiModalEMAQuantizer, update_codebooks
from mmvq.functional import kmeans, sample_rows


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
    draw = kmeans if init == "kmeans" else sample_rows
    first = draw(kept, size)
    quantized, indices, _ = quantizer(z, masks)
    good = masks["audio"]
    assert torch.equal(quantized["audio"][good], first[indices["audio"][good]])
    assert quantizer.codebook.isfinite().all()
    if size > len(kept):
        assert first.unique(dim=0).shape[0] == size


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


def test_first_codes_come_from_the_first_micro_batch() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, partner="none", update="manual")
    first, second = batch(seed=0), batch(seed=1)
    rows = torch.cat([first[m].flatten(0, 1) for m in sorted(NAMES)])
    quantizer(first)
    codes = quantizer.codebook
    assert torch.equal(codes, kmeans(rows, L))
    quantizer(second)
    assert torch.equal(quantizer.codebook, codes)
    quantizer.update_codebook()
    assert not torch.equal(quantizer.codebook, codes)
    counted = sum(counts.sum() for counts in quantizer.usage().counts.values())
    assert counted == 2 * len(rows)


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


def test_partners_whose_scores_overflow_leave_the_codebook_finite() -> None:
    """Each vector is small enough to be squared, but their products divided by the temperature."""
    quantizer = MultiModalEMAQuantizer(512, 4, NAMES, partner_temperature=1e-6, init="uniform")
    x = 9e14 * uniform(2, 3, 512, dtype=torch.float32).sign()
    quantizer({NAMES[0]: x, NAMES[1]: 0.99 * x})
    assert quantizer.codebook.isfinite().all()
