"""What only a GPU can show: dispatch, CUDA graphs, offsets past 2^31, large grids, several GPUs.

The kernels themselves are tested by the files of `interpreter/`, which run on the GPU as well.
`pytest -m gpu` runs both; `make gpu` also takes the times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import draws
from support import bools, rounding, uniform
from torch import Tensor, nn

import mmvq
import mmvq_kernels as kernels

reason = kernels.reason_unavailable("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]
N, L, D = 301, 45, 24
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def rows(n: int = N, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return uniform(n, d, dtype=dtype, seed=seed).cuda()


@DTYPES
def test_the_operators_go_to_the_kernels(dtype: torch.dtype) -> None:
    from mmvq_kernels.gpu import ema, nearest, statistics
    from mmvq_kernels.statistics import split

    x, codes = rows(dtype=dtype), rows(L, seed=1)
    index = kernels.nearest_code(x, codes, backend="triton")
    assert torch.equal(index, nearest.search(x, codes, False))
    n, s = kernels.code_statistics(x, index, L, backend="triton")
    counts, sums = split(statistics.accumulate(x, index, L, None, 1, True), 1, L, D)
    assert torch.equal(n, counts[0])
    assert torch.equal(s, sums)
    mine, direct = ([codes.clone(), codes.clone(), torch.ones_like(n)] for _ in range(2))
    kernels.ema_update_(*mine, s, n, decay=0.9, backend="triton")
    ema.update_(*direct, s, n, 0.9, 1e-5, None, None)
    for a, b in zip(mine, direct, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, codes if a.ndim == 2 else torch.ones_like(n))


def test_the_distribution_and_its_gradient_go_to_the_kernels() -> None:
    from mmvq_kernels.gpu.distribution import backward, forward

    x, codes = rows().view(7, 43, D).requires_grad_(), rows(L, seed=1).requires_grad_()
    used = torch.ones(7, 43, dtype=torch.bool, device="cuda")
    grad = rows(7, L, seed=2)
    log_p = kernels.code_log_probabilities(x, codes, backend="triton")
    log_p.backward(grad)
    direct = forward(x.detach(), codes.detach(), used)
    assert torch.equal(log_p, direct[0])
    wanted = backward(grad, x.detach(), codes.detach(), used, *direct, True)
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(codes.grad, wanted[1])


# The warning is about copies that opcheck makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_the_operators_are_sound_there() -> None:
    x, codes = rows(), rows(L, seed=1)
    index = kernels.nearest_code(x, codes)
    n, s = kernels.code_statistics(x, index, L)
    ops = torch.ops.mmvq
    torch.library.opcheck(ops.nearest_code.default, (x, codes, False))
    torch.library.opcheck(ops.code_statistics.default, (x, index, L, None, 1, True))
    state = codes.clone(), codes.clone(), torch.ones(L, device="cuda")
    torch.library.opcheck(ops.ema_update_.default, (*state, s, n, 0.9, 1e-5, None, None))
    clips = rows().view(7, 43, D).requires_grad_()
    used = torch.ones(7, 43, dtype=torch.bool, device="cuda")
    torch.library.opcheck(ops.code_log_probabilities.default, (clips, codes, used))
    for name, args in draws.operator_calls("cuda").values():
        torch.library.opcheck(getattr(ops, name).default, args)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `work`, warmed up on another stream as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@pytest.mark.parametrize("n", [N, 1, 40_000])
def test_a_graph_of_the_operations_replays_on_new_data(n: int) -> None:
    x, codes = rows(n), rows(L, seed=1)
    found: dict[str, Tensor] = {}

    def work() -> None:
        found["index"] = kernels.nearest_code(x, codes)
        found["n"], found["s"] = kernels.code_statistics(x, found["index"], L)

    graph = captured(work)
    for seed in (5, 6):
        x.copy_(rows(n, seed=seed))
        graph.replay()
        index = kernels.nearest_code(x, codes)
        counts, sums = kernels.code_statistics(x, index, L)
        assert torch.equal(found["index"], index)
        assert torch.equal(found["n"], counts)
        assert torch.equal(found["s"], sums)


def test_a_graph_of_a_training_step_replays_on_new_data() -> None:
    """`aligned`, so that no product of cuBLAS stands between the two: they agree to the bit."""
    quantizer = mmvq.MultiModalEMAQuantizer(
        D, L, init="uniform", partner="aligned", reset_after=1
    ).cuda()
    eager = copy.deepcopy(quantizer)
    names = quantizer.modalities

    def batch(seed: int) -> dict[str, Tensor]:
        return {m: rows(70, seed=seed + i).view(7, 10, D) for i, m in enumerate(names)}

    z = {m: x.requires_grad_() for m, x in batch(0).items()}
    found: list[mmvq.QuantizerOutput] = []

    def work() -> None:
        for x in z.values():
            x.grad = None
        found.clear()  # a capture must not free the autograd graph of another stream
        found.append(quantizer(z))
        found[0].loss.backward()

    graph = captured(work)
    quantizer.load_state_dict(eager.state_dict())  # the warm-up has moved it
    for seed in (10, 20, 30):
        with torch.no_grad():
            for m, x in batch(seed).items():
                z[m].copy_(x)
        graph.replay()
        twins = {m: x.requires_grad_() for m, x in batch(seed).items()}
        expected = eager(twins)
        expected.loss.backward()
        assert torch.equal(found[0].loss, expected.loss)
        for m in names:
            assert torch.equal(found[0].indices[m], expected.indices[m])
            assert torch.equal(z[m].grad, twins[m].grad)
        for name, buffer in eager.named_buffers():
            assert torch.equal(quantizer.get_buffer(name), buffer), name


Call = Callable[..., Tensor]
LOSSES: dict[str, tuple[Callable[[], nn.Module], Call]] = {  # module, features, masks, codes
    "commitment": (
        mmvq.CrossModalCommitmentLoss,
        lambda loss, z, masks, e: loss(z, {m: e[:70].view(7, 10, D) for m in z}, masks),
    ),
    "matching": (
        mmvq.CrossModalCodeMatchingLoss,
        lambda loss, z, masks, e: loss(z, e, masks),
    ),
    "cpc": (
        lambda: mmvq.CrossCPC(D, num_steps=2),
        lambda cpc, z, masks, e: cpc(z, masks, start="all").loss,
    ),
    "club": (
        lambda: mmvq.CLUBEstimator(D, D, 32),
        lambda club, z, masks, e: club(*z.values(), masks and masks["audio"]),
    ),
    "club's penalty": (
        lambda: mmvq.CLUBEstimator(D, D, 32),
        lambda club, z, masks, e: club.penalty(*z.values(), masks and masks["audio"]),
    ),
    "club, to learn": (
        lambda: mmvq.CLUBEstimator(D, D, 32),
        lambda club, z, masks, e: club.learning_loss(*z.values(), masks and masks["audio"]),
    ),
}


def clips(seed: int) -> Tensor:
    return rows(70, seed=seed).view(7, 10, D)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_of_every_loss_replays_on_new_data(name: str, masked: bool) -> None:
    """Up to rounding, as cuBLAS and cuDNN may take other kernels: 2^10 roundings of the largest."""
    torch.manual_seed(0)
    build, loss = LOSSES[name]
    module, codes = build().cuda(), rows(90, seed=40)
    twin = copy.deepcopy(module)
    z = {m: clips(i).requires_grad_() for i, m in enumerate(("audio", "video"))}
    masks = {m: bools(7, 10).cuda() for m in z} if masked else None
    leaves = [*z.values(), *module.parameters()]
    found: list[Tensor] = []

    def work() -> None:
        for x in leaves:
            x.grad = None
        found.clear()
        found.append(loss(module, z, masks, codes))
        found[0].backward()

    graph = captured(work)
    for seed in (10, 20):
        with torch.no_grad():
            for i, x in enumerate(z.values()):
                x.copy_(clips(seed + i))
            for i, mask in enumerate((masks or {}).values()):
                mask.copy_(bools(7, 10, seed=seed + i))
        graph.replay()
        twins = {m: x.detach().clone().requires_grad_() for m, x in z.items()}
        expected = loss(twin, twins, masks, codes)
        twin.zero_grad()
        expected.backward()
        close(found[0], expected)
        for x, y in zip(leaves, [*twins.values(), *twin.parameters()], strict=True):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None and y.grad is not None:
                close(x.grad, y.grad)


def close(mine: Tensor, theirs: Tensor) -> None:
    off = rounding(torch.float32, 1 << 10, theirs.detach().abs().max().item())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=off)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # of itself
def test_a_training_step_does_not_wait() -> None:
    quantizer = mmvq.MultiModalEMAQuantizer(D, L, init="uniform", reset_after=1).cuda()
    z = {m: rows(70).view(7, 10, D).requires_grad_() for m in quantizer.modalities}
    quantizer(z).loss.backward()  # compiling may
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantizer(z).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_on_every_run() -> None:
    x, codes = rows(20_000), rows(L, seed=1)

    def run() -> list[Tensor]:
        index = kernels.nearest_code(x, codes)
        n, s = kernels.code_statistics(x, index, L)
        state = [codes.clone(), codes.clone(), torch.ones(L, device="cuda")]
        kernels.ema_update_(*state, s, n, decay=0.9)
        log_p = kernels.code_log_probabilities(x.view(2000, 10, D), codes)
        return [index, n, s, *state, log_p]

    first = run()
    for _ in range(10):
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("d", [16, 24, 64, 256])
def test_equal_columns_of_a_product_are_equal_to_the_bit(d: int, fast: bool, tile: int) -> None:
    """One code in every column of two tiles: so the lowest index of equal codes wins."""
    from kernels.columns import products

    x, code = rows(128, d), rows(1, d, seed=1)
    found = products(x, code.expand(2 * tile, d).contiguous(), fast, tile)
    bits = found.view(torch.int32)
    assert torch.equal(bits, bits[:, :1].expand_as(bits))
    # a product of two numbers below 1, each rounded to 11 bits or 22, and D of them
    off = 3 * d * (2**-11 if fast else 2**-20)
    assert (found[:, 0].double() - (x.double() @ code.double().T)[:, 0]).abs().max() < off


@pytest.mark.parametrize("n", [N, 40_000])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [16, 24, 64, 256])
def test_the_lowest_of_equal_codes_wins(d: int, dtype: torch.dtype, precision: Any, n: int) -> None:
    """All are one code but the three that make the centre, which lie farther away."""
    code = rows(1, d, seed=1)
    codes = code.repeat(260, 1)
    codes[[0, 130, 259]] += 1
    x = (code + rows(n, d) / 4).to(dtype)
    index = kernels.nearest_code(x, codes, precision=precision, backend="triton")
    assert torch.equal(index, torch.ones_like(index))


def test_offsets_past_2_to_the_31() -> None:
    n, d, last = 2**23 + 9, 256, 5  # 2^31 + 2,304 entries of two bytes
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB")
    x = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    tail = x[-last:]
    tail.copy_(rows(last, d, dtype=torch.bfloat16))
    codes = rows(L, d, seed=1)
    found = kernels.nearest_code(x, codes)
    assert torch.equal(found[-last:], kernels.nearest_code(tail, codes))
    for deterministic in (True, False):
        index = torch.full((n,), -1, device="cuda")
        index[-last:] = torch.arange(last, device="cuda")
        n_found, s_found = kernels.code_statistics(x, index, L, deterministic=deterministic)
        assert torch.equal(s_found[:last], tail.float())
        assert n_found.tolist() == [1] * last + [0] * (L - last)


def test_more_clips_than_a_second_grid_dimension_holds() -> None:
    x, codes = rows(70_000, 4).view(70_000, 1, 4), rows(5, 4, seed=1)
    log_p = kernels.code_log_probabilities(x, codes)
    assert torch.equal(log_p[-3:], kernels.code_log_probabilities(x[-3:], codes))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernels_run_where_the_tensors_are() -> None:
    x, codes = rows(), rows(L, seed=1)
    with torch.cuda.device(0):
        found = kernels.nearest_code(x.to("cuda:1"), codes.to("cuda:1"), backend="triton")
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), kernels.nearest_code(x, codes).cpu())
    with pytest.raises(RuntimeError, match="on several GPUs"):
        kernels.nearest_code(x, codes.to("cuda:1"), backend="triton")
