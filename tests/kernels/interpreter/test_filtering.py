"""The filter before the search: the same indices, and most of them without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import uniform
from torch import Tensor

from mmvq_kernels.gpu import filtering, launching
from mmvq_kernels.gpu.nearest import padded, padded_rows, prepare, search, search_with_ticket
from mmvq_kernels.gpu.tiles import Tile

TILES = [Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)]
Data = tuple[Tensor, Tensor]


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of each launch of the filter."""
    seen: list[Tensor] = []
    launch = launching.launch

    def watch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if kernel is filtering.filter_kernel:
            seen.append(args[4])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", watch)
    return seen


def check(x: Tensor, codebook: Tensor, **options: Any) -> None:
    wanted = search(x, codebook)
    for tile in TILES:
        found, spare = search_with_ticket(x, codebook, force_filter=tile, spare=3, **options)
        assert torch.equal(found, wanted)
        assert spare.tolist() == [0, 0, 0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(N: int, L: int, D: int) -> Data:
    return normal(N, D), normal(L, D, seed=1)


def moved(N: int, L: int, D: int) -> Data:
    return normal(N, D) + 100, normal(L, D, seed=1) + 100


def collapsed(spread: float) -> Callable[[int, int, int], Data]:
    def draw(N: int, L: int, D: int) -> Data:
        point, (x, codebook) = normal(D, seed=2), gaussian(N, L, D)
        return point + spread * x, point + spread * codebook

    return draw


def one_far(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    codebook[L // 2] += 1e4
    return x, codebook


def repeated(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    return x, codebook[torch.arange(L) // 3]


def pairs(apart: int) -> Callable[[int, int, int], Data]:
    """Codes so many columns apart are as near to each other as the high parts tell, or nearer."""

    def draw(N: int, L: int, D: int) -> Data:
        (x, codebook), at = gaussian(N, L, D), torch.arange(L)
        spread = 10 ** (-2 - 2 * torch.rand(L, 1, generator=torch.Generator().manual_seed(2)))
        codebook = codebook[at // (2 * apart) * apart + at % apart]
        return x, codebook + spread * normal(L, D, seed=3)

    return draw


def lattice(N: int, L: int, D: int) -> Data:
    return (2 * normal(N, D)).round(), normal(L, D, seed=1).round()


def of_all_sizes(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    return x * 10 ** (2 * normal(N, 1, seed=2)), codebook * 10 ** (2 * normal(L, 1, seed=3))


def not_finite(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    x[::7, 0], x[1::14, -1], codebook[0], codebook[1::5, 0] = torch.nan, -torch.inf, torch.inf, 1e30
    codebook[L // 2, -1] = torch.nan
    return x, codebook


def overflowing(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    return x * 10.0 ** torch.arange(-40, 39)[torch.arange(N) % 79, None], codebook * 1e17


def underflowing(N: int, L: int, D: int) -> Data:
    x, codebook = gaussian(N, L, D)
    return x * 10.0 ** torch.arange(-45, 1)[torch.arange(N) % 46, None], codebook * 1e-20


DRAWS = {
    "Gaussian": gaussian,
    "moved": moved,
    "collapsed": collapsed(1e-2),
    "collapsed more": collapsed(1e-4),
    "one far": one_far,
    "repeated": repeated,
    "pairs": pairs(1),
    "pairs in a thread": pairs(8),
    "pairs in tiles": pairs(64),
    "lattice": lattice,
    "of all sizes": of_all_sizes,
    "not finite": not_finite,
    "overflowing": overflowing,
    "underflowing": underflowing,
}


@pytest.mark.parametrize("data", DRAWS)
@pytest.mark.parametrize("D", [20, 150])
def test_the_indices_of_the_search(data: str, D: int, device: str) -> None:
    x, codebook = DRAWS[data](140, 150, D)
    check(x.to(device), codebook.to(device))


@pytest.mark.parametrize(
    ("N", "L", "D"), [(1, 1, 1), (0, 3, 4), (1, 300, 5), (130, 1, 20), (129, 257, 64), (67, 2, 129)]
)
def test_odd_sizes(N: int, L: int, D: int, device: str) -> None:
    check(normal(N, D).to(device), normal(L, D, seed=1).to(device))


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float16, 80), (torch.bfloat16, 90), (torch.float32, 100)]
)
def test_every_dtype_and_device(
    dtype: torch.dtype, capability: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "capability", lambda like: capability)
    for D in (20, 100, 150):
        x, codebook = normal(60, D).to(device, dtype), normal(70, D, seed=1).to(device)
        check(x, codebook.to(dtype))
        check(x, codebook)


@pytest.mark.parametrize("amd", [None, "gfx942"])
def test_a_recheck_of_split_codes(
    amd: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "amd", lambda like: amd)
    for draw in (gaussian, repeated):
        x, codebook = draw(300, 400, 20)
        check(x.to(device), codebook.to(device), force=(TILES[0], 64))


@pytest.mark.parametrize("far", [0.0, 1e3, 1e15])
def test_half_of_the_rows_and_more_are_proven(
    far: float, device: str, counters: list[Tensor]
) -> None:
    """Also where one code is far from all others."""
    N, (x, codebook) = 512, gaussian(512, 512, 256)
    codebook[9] += far
    check(x.to(device), codebook.to(device))
    assert len(counters) == len(TILES)
    for each in counters:
        listed, looked = each[:2].tolist()
        print(f"{listed} of {N} rows rechecked")
        assert 0 < listed < N / 2
        assert looked == N


def test_the_way_back(device: str, counters: list[Tensor]) -> None:
    """Once most of 4,096 rows were in doubt, no more are looked at; unless all run at once."""
    N, x, codebook = 6000, *repeated(6000, 60, 10)
    check(x.to(device), codebook.to(device))
    assert len(counters) == len(TILES)
    for each in counters:
        listed, looked = each[:2].tolist()
        assert listed == N
        assert looked == 4096 or (device == "cuda" and looked >= 4096)
    counters.clear()
    check(*(each.to(device) for each in gaussian(N, 60, 10)))
    assert len(counters) == len(TILES)
    assert all(each[1] >= N > 2 * each[0] for each in counters)


@pytest.mark.parametrize("data", DRAWS)
@pytest.mark.parametrize("D", [7, 200])
def test_the_bound_holds(data: str, D: int, device: str) -> None:
    """Between the products that are compared, in float64, and by the norms that prepare writes."""
    N, L = 100, 80
    x, codebook = (each.to(device) for each in DRAWS[data](N, L, D))
    R, P = padded_rows(L), padded(D)
    norms = torch.empty(R + padded_rows(N), 2, device=device)
    high, low, inverse, _ = prepare(x, codebook, norms=norms)
    inverse[:R] *= 2.0**-14
    assert low is not None
    high, low, scale = high.double(), low.double(), inverse.double()[:, None]
    for part, norm in zip((high, low), norms.double().T, strict=True):
        exact = part.norm(dim=1) * scale[:, 0]
        off = (norm - exact).abs() <= 2.0**-20 * exact + 2.0**-149
        assert off[inverse.isfinite() & (exact < 2.0**127)].all()
    fit = inverse[R : R + N].isfinite()
    assert norms[R : R + N][~fit].isnan().all()
    E, e_low = (scale[:L] * part[:L] for part in (high, low))
    X, x_low = ((scale[R:] * part[R:])[:N][fit] for part in (high, low))
    one = X.float() @ E.float().T  # float32 adds in some order
    three = X @ E.T + x_low @ E.T + X @ e_low.T
    norm, low_norm = norms[:L].double().T
    x_norm, x_low_norm = norms[R : R + N][fit].double().T[:, :, None]
    bound = 1.02 * (x_low_norm * norm + x_norm * (low_norm + P * 2.0**-21 * norm)) + 2.0**-121
    sound = x_norm * norm < 2.0**126
    assert ((one.double() - three).abs() <= bound)[sound].all()
    assert sound.any()


def test_only_where_the_table_says_so(
    device: str, counters: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codebook = (uniform(n, 20, dtype=torch.float32, seed=n).to(device) for n in (70, 90))
    search(x, codebook)
    assert counters == []
    monkeypatch.setattr(launching, "name", lambda like: "a GPU")
    monkeypatch.setitem(filtering.FILTERS, "a GPU", {64: (TILES[0], 5000)})
    search(x, codebook)
    assert len(counters) == 1
    search(x, codebook, fast=True)
    search(x[:9], codebook)
    assert len(counters) == 1
    assert filtering.chosen(70, 90, 128, "a GPU") is None
    assert filtering.chosen(70, 90, 32, "another") is None
