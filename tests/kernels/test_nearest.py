"""The search against the float64 reference, and what it promises on ties and odd rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import DTYPES, peak_growth, rounding, strided, uniform, wide
from torch import Tensor

from mmvq_kernels import nearest_code
from mmvq_kernels.nearest import _FEW, nearest_code_ref

SIZES = [(1, 1, 1), (63, 1, 8), (2, 7, 1), (97, 101, 13), (257, 400, 32), (0, 5, 3), (5, 2, 257)]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.double()[:, None] - codebook.double()).square().sum(-1)


def integers(dtype: torch.dtype, half: int) -> tuple[Tensor, Tensor]:
    """Codes of mean 0 and vectors: small integers, so that scores are exact and many are equal."""
    generator = torch.Generator().manual_seed(half)
    codes = torch.randint(-4, 5, (half, 6), generator=generator).to(dtype)
    x = torch.randint(-9, 10, (77, 6), generator=generator).to(dtype)
    return torch.cat([codes, -codes]), x


def lowest_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The lowest index of the smallest distance, by comparing every distance with it."""
    d = distances(x, codebook)
    return (d == d.amin(1, keepdim=True)).int().argmax(1)


@pytest.mark.parametrize(("N", "L", "D"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_as_near_as_rounding_allows(
    N: int, L: int, D: int, dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    x, codebook = uniform(N, D, dtype=dtype), uniform(L, D, dtype=code_dtype, seed=1)
    indices = nearest_code(x, codebook)
    assert indices.shape == (N,)
    assert indices.dtype == torch.long
    d = distances(x, codebook)
    chosen = d.gather(1, indices[:, None])[:, 0]
    # a score sums 2 D products, each at most 2 in centred entries of at most 2: off by
    # (D + 3) roundings of 4 D; the squared distance is twice the score, and two scores compete
    slack = 4 * rounding(torch.promote_types(wide(dtype), code_dtype), D + 3, 4 * D)
    assert (chosen <= d.amin(1) + slack).all() if N else True
    gaps = d.topk(min(2, L), largest=False).values
    clear = (gaps[:, -1] - gaps[:, 0] > slack) if L > 1 else torch.ones(N, dtype=torch.bool)
    assert torch.equal(indices[clear], nearest_code_ref(x, codebook)[clear])
    assert N == 0 or clear.float().mean() > 0.9


@FLOATS
@pytest.mark.parametrize("L", [2, 3, 8, 31, 100, 257, 400, 1024])
@pytest.mark.parametrize("D", [1, 5, 64])
def test_exact_duplicates_give_the_lowest_index(dtype: torch.dtype, L: int, D: int) -> None:
    """Equal columns get unequal scores in a float64 product, so a tie must not rest on them."""
    generator = torch.Generator().manual_seed(L * D)
    distinct = max(1, L // 2)
    source = torch.randint(distinct, (L,), generator=generator)  # which row each code repeats
    rows = uniform(distinct, D, dtype=dtype, seed=D)
    rows[:, 0] += 4 * torch.randperm(distinct, generator=generator)  # apart by 2 or more
    codebook = rows[source]
    first = (source[:, None] == source).int().argmax(1)  # the lowest index with the same row
    assert torch.equal(nearest_code(codebook, codebook), first)
    near = codebook + 1e-2 * uniform(L, D, dtype=dtype, seed=2)
    assert torch.equal(nearest_code(near, codebook), first)


def test_duplicates_of_very_many_columns() -> None:
    """On several threads torch adds up a single row in another order than one of many rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codebook = uniform(1025, 40_000).float()
        codebook[1024] = codebook[3]
        x = codebook[[3] * 16] + 0.01 * uniform(16, 40_000, seed=1).float()
        assert (nearest_code(x, codebook) == 3).all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_few_bits_are_not_taken_for_duplicates(dtype: torch.dtype) -> None:
    """Signs and powers of two differ in the highest bits alone."""
    levels = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=dtype)
    grid = torch.cartesian_prod(*[levels] * 5)  # 1,024 codes
    assert torch.equal(nearest_code(grid, grid), torch.arange(len(grid)))
    signs = torch.cartesian_prod(*[levels[1:3]] * 11)  # 2,048 codes
    assert torch.equal(nearest_code(signs, signs), torch.arange(len(signs)))


@FLOATS
def test_zero_and_minus_zero_are_one_value(dtype: torch.dtype) -> None:
    for a, b in itertools.permutations((0.0, -0.0)):
        codebook = torch.tensor([[9.0, 9.0], [a, 1.0], [b, 1.0], [1.0, a]], dtype=dtype)
        x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, b]], dtype=dtype)
        assert nearest_code(x, codebook).tolist() == [1, 1, 3]


@FLOATS
def test_rows_that_are_not_finite_get_0_and_disturb_nobody(dtype: torch.dtype) -> None:
    x, codebook = uniform(7, 4, dtype=dtype), uniform(9, 4, dtype=dtype, seed=1)
    codebook[0] = 50  # nobody's nearest
    codebook[8] = codebook[3]  # a duplicate: its score is infinite by design
    good = nearest_code(x, codebook)
    assert (good > 0).all()
    for value in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):
        bad = x.clone()
        bad[2, 1] = value
        bad[5] = value
        indices = nearest_code(bad, codebook)
        assert indices[[2, 5]].tolist() == [0, 0] or value == torch.finfo(dtype).max
        assert torch.equal(indices[[0, 1, 3, 4, 6]], good[[0, 1, 3, 4, 6]])
    overflow = torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype)
    assert nearest_code(overflow, codebook).tolist() == [0]


@FLOATS
@pytest.mark.parametrize("N", [1, _FEW, _FEW + 1, 70])
@pytest.mark.parametrize("traced", [False, True])
def test_a_code_that_is_not_finite_is_as_if_it_were_not_there(
    dtype: torch.dtype, N: int, traced: bool
) -> None:
    """Also far from the origin, where the codes must still be centred."""
    x, codebook = (uniform(n, 16, seed=n).to(dtype) + 1000 for n in (N, 30))
    sound = torch.ones(30, dtype=torch.bool)
    sound[[0, 7, 29]] = False
    expected = sound.nonzero()[:, 0][nearest_code_ref(x, codebook[sound])]
    x[1:2], expected[1:2] = torch.nan, 0
    search = torch.compile(nearest_code, backend="eager") if traced else nearest_code
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = codebook.clone()
        spoilt[0], spoilt[7, 3], spoilt[29, ::2] = value, value, -value
        assert torch.equal(search(x, spoilt, backend="torch"), expected)
        assert torch.equal(nearest_code_ref(x, spoilt), expected)
        assert (nearest_code(x, torch.full_like(codebook, value)) == 0).all()


@pytest.mark.parametrize("L", [64, 5000])
def test_few_rows_are_as_exact_as_many(L: int) -> None:
    """Far from the origin, and with codes so close together that float32 differences fail."""
    for offset, spread in ((0.0, 1.0), (1e4, 1.0), (1.0, 1e-4)):
        codebook = (spread * uniform(L, 64, seed=1) + offset).float()
        x = (uniform(200, 64) + offset).float()
        expected = nearest_code_ref(x, codebook)
        found = torch.cat([nearest_code(rows, codebook) for rows in x.split(_FEW)])
        assert torch.equal(found, expected)
        assert all(nearest_code(x[i : i + 1], codebook) == expected[i] for i in range(20))


def test_codes_written_through_data_are_searched_at_once() -> None:
    x, codebook = uniform(1, 4), uniform(9, 4, seed=1)
    nearest_code(x, codebook)
    codebook.data[6] = x[0]
    assert nearest_code(x, codebook).tolist() == [6]


@FLOATS
@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_a_codebook_far_from_the_origin(dtype: torch.dtype, offset: float) -> None:
    """|e|^2 - 2 x.e alone would lose every digit in float32 here: (1e4)^2 * D * 6e-8 = 100."""
    codebook = (uniform(50, 16, seed=1) + offset).to(dtype)
    x = (uniform(200, 16) + offset).to(dtype)
    # what remains: x itself and the mean are rounded to eps * offset, over D products of size 2
    slack = 8 * rounding(dtype, 16, abs(offset)) * 2
    d = distances(x, codebook)
    chosen = d.gather(1, nearest_code(x, codebook)[:, None])[:, 0]
    assert (chosen <= d.amin(1) + slack).all()
    assert slack < d.mean()


@FLOATS
@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 30])
def test_blocks_of_any_size(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codebook, x = integers(dtype, 32)
    monkeypatch.setattr("mmvq_kernels.nearest._BLOCK_BYTES", block_bytes)
    assert torch.equal(nearest_code(x, codebook), lowest_nearest(x, codebook))
    assert nearest_code(x[:0], codebook).shape == (0,)


@FLOATS
@pytest.mark.parametrize("half", [8, 15, 16, 17, 40, 100])
@pytest.mark.parametrize("tile", [5, 16, 48, 1024])
@pytest.mark.parametrize("onednn", [False, True])
def test_ties_across_tiles_go_to_the_lowest_index(
    dtype: torch.dtype,
    half: int,
    tile: int,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codebook, x = integers(dtype, half)
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr("mmvq_kernels.nearest._TILE", tile)
    monkeypatch.setattr("mmvq_kernels.products.ONEDNN", onednn)
    assert torch.equal(nearest_code(x, codebook), lowest_nearest(x, codebook))
    ties = distances(x, codebook)
    assert half < 32 or ((ties == ties.amin(1, keepdim=True)).sum(1) > 1).any()


@FLOATS
@pytest.mark.parametrize("place", [3, 20, 40])
def test_a_row_that_overflows_in_one_tile_gets_0(
    dtype: torch.dtype, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmvq_kernels.nearest._TILE", 16)
    codebook = uniform(48, 2, dtype=dtype)
    codebook[0] = torch.tensor([-100.0, 0.0])
    codebook[place] = torch.tensor([100.0, 0.0])
    x = uniform(_FEW + 1, 2, dtype=dtype, seed=1)
    good = nearest_code(x, codebook)
    assert (good > 0).all()
    x[4] = torch.tensor([torch.finfo(dtype).max / 4, 0.0])  # -inf for one code, finite for many
    good[4] = 0
    assert torch.equal(nearest_code(x, codebook), good)


def test_memory_does_not_grow_with_rows_times_codes() -> None:
    """4,096 x 65,536 scores are 1 GiB in float32, the largest tensors here 4 MiB."""
    setup = (
        "x, codebook = torch.rand(4096, 16), torch.rand(65536, 16)\n"
        "mmvq_kernels.nearest_code(x[:9], codebook[:9])\n"
    )
    assert peak_growth(setup, "mmvq_kernels.nearest_code(x, codebook)") < 100


@FLOATS
def test_same_bits_for_strides_repetition_autocast_and_precision(dtype: torch.dtype) -> None:
    x, codebook = uniform(130, 16, dtype=dtype), uniform(40, 16, dtype=dtype, seed=1)
    expected = nearest_code(x, codebook)
    assert torch.equal(nearest_code(x, codebook), expected)
    assert torch.equal(nearest_code(strided(x), strided(codebook)), expected)
    assert torch.equal(nearest_code(x, codebook, backend="torch", precision="fast"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(x, codebook), expected)


@FLOATS
def test_an_index_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    """Codes one rounding apart: their order rests on the last bit of a score, or of a distance."""
    codebook = uniform(20, 13, dtype=dtype)
    codebook = torch.cat([codebook, codebook * (1 + torch.finfo(dtype).eps)])
    x = uniform(600, 13, dtype=dtype, seed=1)
    expected = nearest_code(x, codebook)
    assert {0, 1} <= set((expected >= 20).int().tolist())
    few = torch.cat([nearest_code(rows, codebook) for rows in x.split(_FEW)])
    assert torch.equal(few % 20, expected % 20)
    for n in (1, 2, 5, _FEW, _FEW + 1, 23, 48, 49, 100, 528, 599):
        wanted = few if n <= _FEW else expected
        assert torch.equal(nearest_code(x[:n], codebook), wanted[:n]), n
        assert torch.equal(nearest_code(x[-n:], codebook), wanted[-n:]), n


def test_inputs_stay_as_they_are_and_no_graph_is_built() -> None:
    x, codebook = uniform(7, 4).requires_grad_(), uniform(5, 4, seed=1).requires_grad_()
    before = x.detach().clone(), codebook.detach().clone()
    assert not nearest_code(x, codebook).requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(codebook, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("L", [5, 7, 23])
def test_ties_on_a_lattice_go_to_the_lowest_index(dtype: torch.dtype, L: int) -> None:
    """Codes with integer, vectors with half-integer coordinates: many distances are equal."""
    generator = torch.Generator().manual_seed(L)
    codebook = torch.randint(-3, 4, (L, 2), generator=generator).to(dtype)
    x = torch.randint(-8, 9, (2000, 2), generator=generator).to(dtype) / 2
    assert torch.equal(nearest_code(x, codebook), nearest_code_ref(x, codebook))
