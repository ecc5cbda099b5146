"""The search kernel against the float64 reference.

SLACK: two float16 parts keep a factor to 2^-22 of it (or 2^-39 of the greatest of its row), and the
product of the two low ones, dropped, is 2^-22: together 6 float32 roundings of a product. A score
is a sum of D of them, each at most 4 (entries below 1, so both centred factors below 2), added in
three runs: off by (3 D + 9) roundings of 4 D at worst, and held to half of that. The squared
distance is twice the score, and two scores compete. The high part alone keeps a factor to 2^-11.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import rounding, strided, uniform
from torch import Tensor

from mmvq_kernels.gpu import launching, nearest
from mmvq_kernels.gpu.nearest import prepare, search, search_with_ticket
from mmvq_kernels.gpu.tiles import TILES, plan
from mmvq_kernels.nearest import nearest_code, nearest_code_ref

# one row, one code, D below, at and past a tile, primes, blocks that end inside a tile
SIZES = [(1, 1, 1), (63, 1, 8), (2, 7, 1), (97, 101, 13), (257, 400, 32), (0, 5, 3), (5, 2, 257)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
PROCESSORS = pytest.mark.parametrize("processors", [1, 132])  # blocks of 128 rows; codes split


def set_processors(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(launching, "processors", lambda like: number)


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.double()[:, None] - codebook.double()).square().sum(-1)


def check_near(indices: Tensor, x: Tensor, codebook: Tensor, slack: float) -> None:
    N, L = len(x), len(codebook)
    assert indices.shape == (N,)
    assert indices.dtype == torch.long
    if N == 0:
        return
    d = distances(x, codebook)
    assert (d.gather(1, indices[:, None])[:, 0] <= d.amin(1) + slack).all()
    if L > 1:
        two = d.topk(2, largest=False).values
        clear = two[:, 1] - two[:, 0] > slack
        assert torch.equal(indices[clear], nearest_code_ref(x, codebook)[clear])


@pytest.mark.parametrize(("N", "L", "D"), SIZES)
@DTYPES
@pytest.mark.parametrize("code_dtype", [torch.bfloat16, torch.float32], ids=str)
@PROCESSORS
def test_as_near_as_rounding_allows(
    N: int,
    L: int,
    D: int,
    dtype: torch.dtype,
    code_dtype: torch.dtype,
    processors: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_processors(monkeypatch, processors)
    x = uniform(N, D, dtype=dtype).to(device)
    codebook = uniform(L, D, dtype=code_dtype, seed=1).to(device)
    check_near(search(x, codebook), x, codebook, 4 * rounding(torch.float32, 3 * D + 9, 2 * D))


@pytest.mark.parametrize(("N", "L", "D"), [(97, 101, 13), (65, 70, 64)])
@DTYPES
def test_fast_is_as_near_as_its_products_allow(
    N: int, L: int, D: int, dtype: torch.dtype, device: str
) -> None:
    x = uniform(N, D, dtype=dtype).to(device)
    codebook = uniform(L, D, dtype=torch.float32, seed=1).to(device)
    slack = 4 * (2 * 2**-11 * 2 * D + rounding(torch.float32, 3 * D + 9, 2 * D))
    check_near(search(x, codebook, fast=True), x, codebook, slack)


def test_fast_has_no_low_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    launch = launching.launch

    def watch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if kernel is nearest.search_kernel:
            seen.append(args[1] is None)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", watch)
    codebook = uniform(3, 4, dtype=torch.float32).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        for fast in (False, True):
            search(codebook.to(dtype), codebook, fast=fast)
    assert seen == [False, True, False, True]


@PROCESSORS
@pytest.mark.parametrize("L", [2, 31, 257, 400])
def test_exact_duplicates_give_the_lowest_index(
    L: int, processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_processors(monkeypatch, processors)
    generator = torch.Generator().manual_seed(L)
    distinct = max(1, L // 2)
    source = torch.randint(distinct, (L,), generator=generator)  # which row each code repeats
    rows = uniform(distinct, 5, dtype=torch.float32)
    rows[:, 0] += 4 * torch.randperm(distinct, generator=generator)
    first = (source[:, None] == source).int().argmax(1)
    codebook = rows[source]
    near = codebook + 1e-2 * uniform(L, 5, dtype=torch.float32, seed=2)
    for x in (codebook, near):
        assert torch.equal(search(x.to(device), codebook.to(device)).cpu(), first)


@PROCESSORS
def test_ties_between_different_codes_give_the_lowest_index(
    processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of small integers around mean 0: every score is exact, so that ties are ties."""
    set_processors(monkeypatch, processors)
    half = torch.randint(-4, 5, (150, 3), generator=torch.Generator().manual_seed(0)).float()
    codebook = torch.cat([half, -half])
    x = torch.randint(-9, 10, (200, 3), generator=torch.Generator().manual_seed(1)).float()
    d = distances(x, codebook)
    expected = (d == d.amin(1, keepdim=True)).int().argmax(1)
    assert ((d == d.amin(1, keepdim=True)).sum(1) > 1).sum() > 50
    assert torch.equal(search(x.to(device), codebook.to(device)).cpu(), expected)


@pytest.mark.parametrize("data", ["Gaussian", "offset", "collapsed"])
def test_exact_is_as_exact_as_float32_and_fast_nearly(data: str, device: str) -> None:
    """As docs/kernels.md says."""
    N, L, D = 256, 256, 128
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(N, D, generator=generator), torch.randn(L, D, generator=generator)
    if data == "offset":
        x, codebook = x + 100, codebook + 100
    if data == "collapsed":
        point = torch.randn(D, generator=generator)
        x, codebook = point + 1e-2 * x, point + 1e-2 * codebook
    for dtype in (torch.float32, torch.bfloat16):
        rows, codes = x.to(device, dtype), codebook.to(device)
        wanted = nearest_code_ref(rows, codes)
        inexact = (nearest_code(rows, codes, backend="torch") != wanted).sum()
        assert (search(rows, codes) != wanted).sum() <= inexact
        errs = (search(rows, codes, fast=True) != wanted).float().mean()
        assert errs < 0.01


def test_fast_is_not_exact(device: str) -> None:
    """Codes in pairs, 2^-9 of their length apart: scores differ by 2^-19 of what is added up."""
    near = uniform(40, 64, dtype=torch.float32, seed=1)
    codebook = torch.stack([near, near * (1 + 2**-9)], 1).flatten(0, 1)
    x = torch.cat([codebook, codebook]).to(device)
    codebook = codebook.to(device)
    wanted = nearest_code_ref(x, codebook)
    assert torch.equal(search(x, codebook), wanted)
    errs = search(x, codebook, fast=True) != wanted
    assert errs.float().mean() > 0.1


def test_zero_and_minus_zero_are_one_value(device: str) -> None:
    codebook = torch.tensor([[9.0, 9.0], [0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]], device=device)
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, -0.0]], device=device)
    assert search(x, codebook).tolist() == [1, 1, 3]


@PROCESSORS
def test_a_score_of_minus_zero_ties_with_zero(
    processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-norm below the smallest float is -0 where a GPU rounds a product and a sum at once."""
    set_processors(monkeypatch, processors)
    codebook = uniform(200, 16, dtype=torch.float32, seed=1).to(device)

    def prepared(*args: Any) -> tuple[Tensor | None, ...]:
        high, low, inverse, half_norm = prepare(*args)
        half_norm = half_norm.abs() + 1
        half_norm[[5, 70, 150]] = torch.tensor([0.0, -0.0, -0.0], device=device)
        return high.zero_(), low, inverse, half_norm

    monkeypatch.setattr(nearest, "prepare", prepared)
    assert search(torch.zeros(3, 16, device=device), codebook).tolist() == [5, 5, 5]


@PROCESSORS
@pytest.mark.parametrize("fast", [False, True])
def test_rows_that_are_not_finite_get_0_and_disturb_nobody(
    processors: int, fast: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_processors(monkeypatch, processors)
    x = uniform(140, 4, dtype=torch.float32)
    codebook = uniform(70, 4, dtype=torch.float32, seed=1)
    codebook[0] = 50  # nobody's nearest
    codebook[8] = codebook[3]  # a duplicate
    x, codebook = x.to(device), codebook.to(device)
    good = search(x, codebook, fast=fast)
    assert (good > 0).all()
    for value in (torch.nan, torch.inf, -torch.inf):
        for column in (0, 3):
            spoilt = x.clone()
            spoilt[[2, 139], column] = value
            out = search(spoilt, codebook, fast=fast)
            assert out[[2, 139]].tolist() == [0, 0]
            keep = torch.ones(140, dtype=torch.bool)
            keep[[2, 139]] = False
            assert torch.equal(out[keep], good[keep])
    overflow = torch.full((1, 4), torch.finfo(torch.float32).max, device=device)
    assert search(overflow, codebook, fast=fast).tolist() == [0]


@PROCESSORS
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("D", [4, 70])
def test_a_code_that_is_not_finite_is_as_if_it_were_not_there(
    processors: int, fast: bool, D: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a lattice far from the origin: exact only if the other codes are centred, in tf32 too."""
    set_processors(monkeypatch, processors)
    x, codebook = ((4 * uniform(n, D, seed=n)).round().to(device) + 512 for n in (140, 70))
    sound = torch.ones(70, dtype=torch.bool, device=device)
    sound[[0, 8, 69]] = False
    expected = sound.nonzero()[:, 0][nearest_code_ref(x, codebook[sound])]
    x, codebook = x.float(), codebook.float()
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = codebook.clone()
        spoilt[0], spoilt[8, 3], spoilt[69, ::2] = value, value, -value
        assert torch.equal(search(x, spoilt, fast=fast), expected)
        assert (search(x, torch.full_like(codebook, value), fast=fast) == 0).all()


def test_a_codebook_far_from_the_origin(device: str) -> None:
    offset = 1e3
    codebook = (uniform(50, 16, seed=1) + offset).float().to(device)
    x = (uniform(100, 16) + offset).float().to(device)
    # float32 numbers so close to each other differ exactly: as near as without the offset
    slack = 4 * rounding(torch.float32, 3 * 16 + 9, 2 * 16)
    check_near(search(x, codebook), x, codebook, slack)


@DTYPES
def test_same_bits_for_strides_and_any_split(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = uniform(130, 16, dtype=dtype).to(device)
    codebook = uniform(700, 16, dtype=dtype, seed=1).to(device)
    expected = search(x, codebook)
    assert torch.equal(search(strided(x), strided(codebook)), expected)
    for processors in (1, 3):
        set_processors(monkeypatch, processors)
        assert torch.equal(search(x, codebook), expected)


@pytest.mark.parametrize(("N", "L", "D"), [(3, 8209, 4), (3, 100, 1024)])
def test_many_codes_and_wide_ones(N: int, L: int, D: int, device: str) -> None:
    if device == "cuda" and D == 4:
        L = 262_144  # the interpreter takes a minute
    codebook = uniform(L, D, dtype=torch.float32, seed=1).to(device)
    wanted = torch.tensor([0, L // 2, L - 1], device=device)
    x = codebook[wanted]
    indices = search(x, codebook)
    check_near(indices, x, codebook, 4 * rounding(torch.float32, 3 * D + 9, 2 * D))
    assert torch.equal(indices, wanted)


@pytest.mark.parametrize("D", [5, 48, 100])
@pytest.mark.parametrize("fast", [False, True])
@DTYPES
def test_prepared_rows(D: int, fast: bool, dtype: torch.dtype, device: str) -> None:
    N, L = 1500, 37
    x, codebook = (uniform(n, D, dtype=dtype, seed=n).to(device) + 3 for n in (N, L))
    sizes = torch.logspace(-30, 4, N, 2, device=device, dtype=torch.float32)
    if dtype == torch.float32:  # rows of all sizes
        x, codebook = x * sizes[:, None], codebook * sizes[:L, None]
    x[7, 2] = torch.nan
    codebook[8, 3] = torch.inf
    packed = torch.zeros(N, dtype=torch.long, device=device)
    tickets = torch.ones(1100, dtype=torch.int32, device=device)
    high, low, inverse, half_norm = prepare(x, codebook, fast, packed, tickets)
    assert (packed == torch.iinfo(torch.int64).max).all()
    assert not tickets.any()
    assert (low is None) == fast
    assert (high.shape[1] >= D) & (high.shape[1] % 16 == 0)
    centre = codebook[[0, 18, 36]].float().median(0).values
    fit = torch.ones(len(high), dtype=torch.bool, device=device)
    fit[[8, len(half_norm) + 7]] = False
    for rows, first in ((codebook, 0), (x, len(half_norm))):
        moved = (rows.float() - centre).double()
        at = slice(first, first + len(rows))
        moved[~fit[at]] = 0
        parts = [high[at].double()] + ([] if fast else [low[at].double()])
        greatest = moved.abs().amax(1, keepdim=True)
        for part in parts:
            assert not part[:, D:].any()
        of_rows = inverse[at] * (1.0 if first else 2.0**-14)
        off = (sum(parts)[:, :D] * of_rows[:, None].nan_to_num(0) - moved).abs()
        assert (off <= moved.abs() * 2.0 ** -(11 if fast else 22) + greatest * 2.0**-39).all()
        finite = inverse[at][fit[at]]
        assert torch.equal(torch.frexp(finite).mantissa, torch.full_like(finite, 0.5))
        assert (finite > 0).all()
    assert inverse[len(half_norm) + 7].isnan()
    assert not high[L : len(half_norm)].any()
    assert not high[len(half_norm) + N :].any()
    assert (half_norm[L:] == torch.inf).all()
    assert half_norm[8] == torch.inf
    exact = (codebook.float() - centre).double().square().sum(1) / 2
    # D products of two factors, each rounded, and D additions
    slack = exact * rounding(torch.float32, D + 3, 1) + torch.finfo(torch.float32).tiny
    assert ((half_norm[:L] - exact).abs() <= slack)[fit[:L]].all()


@pytest.mark.parametrize("far", range(8))
def test_one_code_far_from_the_others(far: int, device: str) -> None:
    """Wherever it stands, the centre lies among the others."""
    x, codebook = (1e-3 * uniform(n, 20, seed=n, dtype=torch.float32) for n in (90, 8))
    codebook[far] += 1e3
    x, codebook = x.to(device), codebook.to(device)
    slack = 4 * rounding(torch.float32, 3 * 20 + 9, 2 * 20 * 1e-6)
    check_near(search(x, codebook), x, codebook, slack)


@pytest.mark.parametrize("P", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("N", "L", "split"),
    [
        (1_600, 400, True),
        (17_000, 1_024, None),
        (65_536, 8_192, False),
        (1 << 20, 512, False),
        (1, 1, False),
        (0, 5, False),
    ],
)
def test_the_grid_fills_the_processors(N: int, L: int, split: bool | None, P: int) -> None:
    tile, share = plan(N, L, P, 132)
    assert share % tile.codes == 0
    assert split in (None, share < L)
    if N >= 17_000:  # tiles, over those that the processors could do in the same time
        blocks, programs = launching.cdiv(N, tile.rows), launching.cdiv(L, share)
        waves = launching.cdiv(blocks * programs, 132)
        done = blocks * launching.cdiv(L, tile.codes)
        assert done / (132 * waves * share // tile.codes) > 5 / 8


@pytest.mark.parametrize("D", [20, 100, 150])
@pytest.mark.parametrize("fast", [False, True])
def test_same_indices_by_every_tile(D: int, fast: bool, device: str) -> None:
    x, codebook = (uniform(n, D, seed=n, dtype=torch.float32).to(device) for n in (150, 400))
    wanted = search(x, codebook, fast)
    for tile in {tile for costs in TILES.values() for tile in costs}:
        for share in (tile.codes, 512):
            assert torch.equal(search_with_ticket(x, codebook, fast, 0, (tile, share))[0], wanted)


SCALES = [1e-30, 1e-18, 3e-19, 1e-6, 1.0, 1e6, 1e15]


@pytest.mark.parametrize("of_codes", SCALES)
@pytest.mark.parametrize("of_x", SCALES)
def test_every_scale(of_x: float, of_codes: float, device: str) -> None:
    """Small, large, and both: as near as the torch path, unless its own scores underflow."""
    x = of_x * uniform(60, 20, dtype=torch.float32)
    codebook = of_codes * uniform(70, 20, dtype=torch.float32, seed=1)
    x, codebook = x.to(device), codebook.to(device)
    greatest = (x.abs().amax() + codebook.abs().amax()).double() * codebook.abs().amax().double()
    slack = rounding(torch.float32, 4 * (3 * 20 + 9), 2 * 20) * greatest + 2.0**-140
    chosen = search(x, codebook)
    e = codebook.double()
    scores = e.square().sum(1) - 2 * x.double() @ e.T
    assert (scores.gather(1, chosen[:, None])[:, 0] <= scores.amin(1) + slack).all()


def test_rows_and_codes_of_very_different_size(device: str) -> None:
    """Each has its own scale: one of 1e8 takes no digit from one of 1e-4."""
    N, L, D = 120, 130, 20
    sizes = torch.logspace(-4, 8, 13)
    x = uniform(N, D, dtype=torch.float32) * sizes.repeat(10)[:N, None]
    codebook = uniform(L, D, dtype=torch.float32, seed=1) * sizes.repeat(10)[:, None]
    codebook[[0, L // 2, L - 1]] *= 1e-8  # the centre is one of the small ones
    x, codebook = x.to(device), codebook.to(device)
    e = codebook.double()
    scores = e.square().sum(1) - 2 * x.double() @ e.T
    chosen = search(x, codebook)
    norms = e.square().sum(1) + 2 * x.double().norm(dim=1)[:, None] * e.norm(dim=1)
    both = norms.gather(1, chosen[:, None])[:, 0] + norms.gather(1, scores.argmin(1)[:, None])[:, 0]
    slack = rounding(torch.float32, 3 * D + 9, 1) * both
    assert (scores.gather(1, chosen[:, None])[:, 0] <= scores.amin(1) + slack).all()


def test_split_codes_with_the_barriers_of_amd(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody unpacks in the kernel, and the indices are the same."""
    x, codebook = (uniform(n, 20, seed=n, dtype=torch.float32).to(device) for n in (90, 400))
    wanted = search(x, codebook)
    assert plan(90, 400, 32, launching.processors(x))[1] < 400
    monkeypatch.setattr(launching, "amd", lambda like: "gfx942")
    assert torch.equal(search(x, codebook), wanted)
