"""Cross-CPC against one loop over directions, steps, starts and clips.

ATOL: float64; scores are below 10 here and come from an LSTM, W and a product, some 100 operations;
ln B and means add 50: 150 roundings of 10.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
from support import DTYPES, bools, close, rounding, uniform
from torch import Tensor

from mmvq import CrossCPC

B, T, D, C = 5, 7, 4, 6
NAMES = ("video", "audio", "text")
ATOL = rounding(torch.float64, 150, 10)
Tensors = dict[str, Tensor]
Start = int | Literal["all"]


def batch(dtype: torch.dtype = torch.float64, names: tuple[str, ...] = NAMES) -> Tensors:
    return {m: uniform(B, T, D, dtype=dtype, seed=i) for i, m in enumerate(names)}


def module(names: tuple[str, ...] = NAMES, **options: Any) -> CrossCPC:
    torch.manual_seed(1)
    return CrossCPC(D, names, context_dim=C, **options).double()


def nll(scores: Tensor, own: int) -> Tensor:
    return -torch.log_softmax(scores, 0)[own]


def loop(
    cpc: CrossCPC, z: Tensors, masks: Tensors, start: Start
) -> tuple[Tensor, dict[Any, float]]:
    """Eq. 6 one prediction at a time, over the clips valid for it."""
    last = T - cpc.num_steps - cpc.first_step + 1
    starts = range(cpc.min_context, last + 1) if start == "all" else [start]
    across, within, accuracy = [], [], {}
    for a in sorted(z):
        for b in sorted(z):
            if a == b and not cpc.self_weight:
                continue
            losses, hits = [], []
            for t in starts:
                context = cpc.contexts[a](z[a][:, :t])[0][:, -1]  # [B, C]
                for k in range(cpc.num_steps):
                    target = t - 1 + cpc.first_step + k
                    valid = (masks[a][:, t - 1] & masks[b][:, target]).nonzero()[:, 0]
                    predicted = context[valid] @ cpc.predictors[a][k].T
                    future = z[b][valid, target]
                    if cpc.normalize:
                        predicted = predicted / predicted.norm(dim=1, keepdim=True)
                        future = future / future.norm(dim=1, keepdim=True)
                    scores = predicted @ future.T / cpc.temperature  # contexts x targets
                    for i in range(len(valid)):
                        over = {"targets": nll(scores[i], i), "contexts": nll(scores[:, i], i)}
                        over["both"] = (over["targets"] + over["contexts"]) / 2
                        losses.append(over[cpc.normalize_over])
                        axis = scores[:, i] if cpc.normalize_over == "contexts" else scores[i]
                        hits.append(float(axis.argmax() == i))
            if losses:
                (within if a == b else across).append(torch.stack(losses).mean())
            accuracy[a, b] = sum(hits) / max(len(hits), 1)
    loss = torch.stack(across).mean() if across else torch.zeros(())
    if within:
        loss = loss + cpc.self_weight * torch.stack(within).mean()
    return loss, accuracy


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_steps": 3, "num_layers": 2},
    {"first_step": 0, "min_context": 3, "normalize_over": "contexts"},
    {"first_step": 2, "num_steps": 2, "normalize_over": "both", "temperature": 0.5},
    {"self_weight": 0.1, "normalize": True, "temperature": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("start", [3, "all"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES], ids=len)
def test_equals_the_loop(
    options: dict[str, Any], start: Start, masked: bool, names: tuple[str, ...]
) -> None:
    cpc, z = module(names, **options), batch(names=names)
    masks = {
        m: bools(B, T, seed=i) if masked else torch.ones(B, T) > 0 for i, m in enumerate(names)
    }
    clean = {m: torch.where(masks[m][..., None], x, 0) for m, x in z.items()}
    spoilt = {m: torch.where(masks[m][..., None], x, torch.nan) for m, x in z.items()}
    loss, accuracy = cpc(spoilt, masks if masked else None, start=start)
    expected, hits = loop(cpc, clean, masks, start)
    close(loss, expected, ATOL)
    assert accuracy.keys() == hits.keys()
    for pair, share in hits.items():
        close(accuracy[pair], share, rounding(torch.float32, 2))


@pytest.mark.parametrize("self_weight", [0.0, 0.5])
def test_missing_modalities(self_weight: float) -> None:
    cpc, z = module(self_weight=self_weight), batch()
    every = {m: torch.ones(B, T, dtype=torch.bool) for m in NAMES}
    two = {m: z[m] for m in ("text", "video")}
    close(cpc(two, start="all").loss, loop(cpc, two, every, "all")[0], ATOL)
    gone = every | {"audio": torch.zeros(B, T, dtype=torch.bool)}
    close(cpc(z, gone, start="all").loss, cpc(two, start="all").loss, ATOL)
    alone = {"audio": z["audio"]}
    loss, accuracy = cpc(alone, start="all")
    close(loss, loop(cpc, alone, every, "all")[0], ATOL)
    assert set(accuracy) == ({("audio", "audio")} if self_weight else set())
    loss.backward()  # zero or not, it can be added to others


def test_a_random_start_is_one_of_all() -> None:
    cpc, z = module(num_steps=2, min_context=2), batch()
    each = torch.stack([cpc(z, start=t).loss for t in range(2, T - 2 + 1)])
    drawn = [cpc(z, generator=torch.Generator().manual_seed(seed)).loss for seed in range(40)]
    found = {int((each - loss).abs().argmin()) for loss in drawn}
    assert all((each - loss).abs().min() <= ATOL for loss in drawn)
    assert found == set(range(len(each)))  # 40 draws miss one of four with probability 4e-5
    close(cpc(z, start="all").loss, each.mean(), ATOL)
    again = cpc(z, generator=torch.Generator().manual_seed(7)).loss
    assert torch.equal(again, drawn[7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    cpc = module(num_steps=2, self_weight=0.1).to(dtype)
    z = {m: x.requires_grad_() for m, x in batch(dtype).items()}
    loss, accuracy = cpc(z, start="all")
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in z.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cpc.parameters())
    assert all(0 <= share <= 1 and not share.requires_grad for share in accuracy.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_take_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    cpc, z = module().float(), batch(dtype)
    expected = cpc({m: x.float() for m, x in z.items()}, start="all").loss
    assert torch.equal(cpc(z, start="all").loss, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cpc(z, start="all").loss
    assert loss.dtype == torch.float32
    # scores of size 1 in bfloat16 are off by a few times 2^-8
    close(loss, expected, 4 * 2**-8)


def test_nothing_to_predict_is_zero() -> None:
    cpc, z = module(), batch()
    loss, accuracy = cpc(z, {m: torch.zeros(B, T, dtype=torch.bool) for m in NAMES}, start="all")
    assert loss == 0
    assert all(share == 0 for share in accuracy.values())
    loss, accuracy = cpc({m: x[:0] for m, x in z.items()}, start="all")
    assert loss == 0
    assert cpc({m: x[:1] for m, x in z.items()}, start="all").loss == 0  # one clip, one candidate


def test_state_and_copies() -> None:
    cpc = module(num_layers=2)
    other = CrossCPC(D, NAMES, context_dim=C, num_layers=2).double()
    other.load_state_dict(cpc.state_dict())
    for twin in (other, deepcopy(cpc)):
        assert torch.equal(twin(batch(), start="all").loss, cpc(batch(), start="all").loss)
    assert {name.split(".")[0] for name in cpc.state_dict()} == {"contexts", "predictors"}
    assert CrossCPC(D).modalities == ("audio", "video")
    assert CrossCPC(D).predictors["audio"].shape == (1, D, D)
