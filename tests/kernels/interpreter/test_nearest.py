"""The search kernel against the float64 reference.

SLACK: tf32x3 keeps a product to 6 float32 roundings (2^-22 of each factor, and the product of the
two small parts is dropped). A score is a sum of D of them, each at most 4 (entries below 1, so both
centred factors below 2), added in three runs: off by (3 D + 9) roundings of 4 D at worst, and held
to half of that. The squared distance is twice the score, and two scores compete. tf32 cuts a factor
at 2^-10 or rounds it to 2^-11, bf16 rounds it to 2^-8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import rounding, strided, uniform
from torch import Tensor

from mmvq_kernels.gpu import launching, nearest
from mmvq_kernels.gpu.nearest import plan, prepare, search
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
    factors = 2 * (2**-8 if dtype == torch.bfloat16 else 2**-10)
    slack = 4 * (factors * 2 * D + rounding(torch.float32, 3 * D + 9, 2 * D))
    check_near(search(x, codebook, fast=True), x, codebook, slack)


def test_fast_bfloat16_multiplies_bfloat16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    launch = launching.launch

    def watch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if kernel is nearest.search_kernel:
            seen.append(options["PRECISION"])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", watch)
    codebook = uniform(3, 4, dtype=torch.float32).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        for fast in (False, True):
            search(codebook.to(dtype), codebook, fast=fast)
    assert seen == ["tf32x3", "bf16", "tf32x3", "tf32"]


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
def test_exact_is_as_exact_as_float32_and_fast_is_not(data: str, device: str) -> None:
    """As docs/kernels.md says: of the fast ways bf16 errs where codes lie close together."""
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
        assert errs < 0.01 if dtype == torch.float32 or data == "Gaussian" else errs > 0


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
        centre, high, low, half_norm = prepare(*args)
        half_norm = half_norm.abs() + 1
        half_norm[[5, 70, 150]] = torch.tensor([0.0, -0.0, -0.0], device=device)
        return torch.zeros_like(centre), high, low, half_norm

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


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_prepared_codes_and_half_norms(precision: str, device: str) -> None:
    codebook = uniform(37, 48, dtype=torch.float32).to(device) + 3
    packed = torch.zeros(1500, dtype=torch.long, device=device)
    tickets = torch.ones(1100, dtype=torch.int32, device=device)
    centre, high, low, half_norm = prepare(codebook, precision, packed, tickets)
    assert (packed == torch.iinfo(torch.int64).max).all()
    assert not tickets.any()
    assert torch.equal(centre, codebook[[0, 18, 36]].median(0).values)
    codes = codebook - centre
    rounded = 2**-8 if precision == "bf16" else 2**-11
    assert ((high.float() - codes).abs() <= rounded * codes.abs()).all()
    if low is not None:
        assert torch.equal(high + low, codes)
    exact = codes.double().square().sum(1) / 2
    if precision == "bf16":
        exact += codes.double() @ centre.double()
    # D products of at most 2 * 4 each, two roundings in each and D additions
    assert ((half_norm - exact).abs() < rounding(torch.float32, 48 + 2, 48 * 8)).all()


@pytest.mark.parametrize("far", range(8))
def test_one_code_far_from_the_others(far: int, device: str) -> None:
    """Wherever it stands, the centre lies among the others."""
    x, codebook = (1e-3 * uniform(n, 20, seed=n, dtype=torch.float32) for n in (90, 8))
    codebook[far] += 1e3
    x, codebook = x.to(device), codebook.to(device)
    slack = 4 * rounding(torch.float32, 3 * 20 + 9, 2 * 20 * 1e-6)
    check_near(search(x, codebook), x, codebook, slack)


@pytest.mark.parametrize(
    ("N", "L", "width", "split"),
    [
        (1_600, 400, 64, True),
        (17_000, 1_024, 128, True),
        (65_536, 8_192, 128, False),
        (1 << 20, 512, 128, False),
        (1, 1, 64, False),
        (0, 5, 64, False),
    ],
)
def test_the_grid_fills_the_processors(N: int, L: int, width: int, split: bool) -> None:
    chosen, share = plan(N, L, 132)
    assert (chosen, share % width, share < L) == (width, 0, split)
    assert plan(N, L, 132, 64)[0] == 64
    if N >= 17_000:  # tiles, over those that the processors could do in the same time
        blocks = launching.cdiv(N, 128)
        waves = launching.cdiv(blocks * launching.cdiv(L, share), 132)
        assert blocks * launching.cdiv(L, width) / (132 * waves * share // width) > 7 / 8


def test_split_codes_with_the_barriers_of_amd(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody unpacks in the kernel, and the indices are the same."""
    x, codebook = (uniform(n, 20, seed=n, dtype=torch.float32).to(device) for n in (90, 400))
    wanted = search(x, codebook)
    assert plan(90, 400, launching.processors(x))[1] < 400
    monkeypatch.setattr(launching, "amd", lambda like: "gfx942")
    assert torch.equal(search(x, codebook), wanted)
