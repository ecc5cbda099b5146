"""First codes from data."""

from __future__ import annotations

import pytest
import torch
from support import bools, close, rounding, strided, uniform
from torch import Tensor

from mmvq.functional import kmeans, nearest_code_ref, sample_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inertia(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(x, centres).min(1).values.square().sum()


@DTYPES
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (20, 1), (20, 7), (20, 20)])
def test_samples_are_distinct_rows(dtype: torch.dtype, rows: int, codes: int) -> None:
    x = uniform(rows, 3, dtype=dtype)
    drawn = sample_rows(x, codes)
    assert drawn.dtype == dtype
    found = [(row == x).all(1).nonzero().item() for row in drawn]  # each is exactly one row
    assert len(set(found)) == codes
    assert torch.equal(sample_rows(strided(x), codes), drawn)


def test_a_draw_is_spread_over_the_rows() -> None:
    """Rows are clips in order: a draw must not favour the first of them."""
    picked = sample_rows(torch.arange(1000.0)[:, None], 200)
    # the mean of 200 of 1000 has a deviation of 288.7 / sqrt(200) * sqrt(0.8) = 18.3
    assert abs(picked.mean() - 499.5) < 4 * 18.3
    assert picked.unique().numel() == 200


@DTYPES
def test_more_codes_than_rows_repeat_with_a_jitter(dtype: torch.dtype) -> None:
    x = uniform(5, 3, dtype=dtype)
    drawn = sample_rows(x, 23)
    order = [(row == x).all(1).nonzero().item() for row in drawn[:5]]
    assert sorted(order) == [0, 1, 2, 3, 4]
    away = drawn - x[torch.tensor(order).repeat(5)[:23]]
    limit = 0.01 * (x.amax(0) - x.amin(0)) + 2 * torch.finfo(dtype).eps
    assert (away[:5] == 0).all()
    assert (away.abs() <= limit).all()
    assert (away[5:] > 0).any()
    assert (away[5:] < 0).any()
    assert drawn.unique(dim=0).shape[0] == 23


@DTYPES
def test_kmeans_is_lloyd(dtype: torch.dtype) -> None:
    x = uniform(60, 2, dtype=dtype)
    centres = kmeans(x, 6, iterations=0)
    for _ in range(4):
        owner = nearest_code_ref(x, centres)
        means = [x[owner == i].mean(0) if (owner == i).any() else centres[i] for i in range(6)]
        assert inertia(x, torch.stack(means)) <= inertia(x, centres)
        centres = torch.stack(means)
    # four rounds, each a mean of up to 60 values below 1
    close(kmeans(x, 6, iterations=4), centres, rounding(dtype, 4 * 62))


@DTYPES
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e14])
def test_every_tight_cluster_gets_a_centre(dtype: torch.dtype, scale: float) -> None:
    """Where one stays without, the error is that of a whole cluster, 1e4 times as large, for ever.

    Clusters of 2^-10 at corners of a cube, 2 or more apart, some of one row and some of hundreds.
    """
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    sizes = 1 + torch.arange(64) ** 2 // 8
    which = torch.arange(64).repeat_interleave(sizes)[uniform(int(sizes.sum())).argsort()]
    x = (scale * (corners[which] + uniform(len(which), 6, seed=1) / 1024)).to(dtype)
    for iterations in (0, 10):
        centres = kmeans(x, 64, iterations=iterations)
        found = (centres / scale).sign().double() @ corners.T == 6
        assert found.any(0).all()


@pytest.mark.parametrize("draw", ["Gaussian", "unequal"])
def test_as_good_as_the_kmeans_of_scikit_learn(draw: str) -> None:
    """Mean of four draws each; its own is 3% (Gaussian) or more apart from draw to draw."""
    cluster = pytest.importorskip("sklearn.cluster")
    ours, theirs = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(800, 8, generator=generator)
        if draw == "unequal":
            which = torch.multinomial(1 / torch.arange(1.0, 41), 800, True, generator=generator)
            x += 5 * torch.randn(40, 8, generator=generator)[which]
        ours.append(inertia(x, kmeans(x, 40)).item())
        theirs.append(cluster.KMeans(40, n_init=1, random_state=seed).fit(x.numpy()).inertia_)
    assert sum(ours) < 1.05 * sum(theirs)


def test_first_centres_are_distinct_rows_then_jittered_ones() -> None:
    distinct = uniform(9, 3)
    x = distinct.repeat(4, 1)
    centres = kmeans(x, 23, iterations=0)
    assert ((centres[:9, None] == distinct).all(-1).sum(0) == 1).all()
    gaps = torch.cdist(centres[9:], distinct).amin(1)
    spread = (x.amax(0) - x.amin(0)).norm()
    assert ((gaps > 0) & (gaps <= 0.01 * spread)).all()
    assert centres.unique(dim=0).shape[0] == 23


def test_each_of_many_tight_clusters_gets_its_own_code() -> None:
    centres = 10 * uniform(1100, 8)
    x = centres.repeat(3, 1) + 0.01 * uniform(3300, 8, seed=1)
    drawn = kmeans(x, 1100, iterations=0)
    assert torch.cdist(centres, drawn).amin(1).max() < 0.01 * 8**0.5


@DTYPES
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_that_are_not_usable_change_no_bit(dtype: torch.dtype, rows: int) -> None:
    """Wherever they are and whatever they hold; nor do rows that are not finite."""
    x = uniform(rows, 5, dtype=dtype)
    expected = kmeans(x, 12)
    for seed, value in enumerate((torch.nan, torch.inf, 0.25, torch.finfo(dtype).max)):
        usable = torch.arange(rows + 30) < rows
        usable = usable[uniform(rows + 30, seed=seed).argsort()]
        mixed = x.new_full((rows + 30, 5), value)
        mixed[usable] = x
        assert torch.equal(kmeans(mixed, 12, usable), expected)
        if value != 0.25:
            assert torch.equal(kmeans(mixed, 12), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_a_graph_holds_the_draw_as_one_operator() -> None:
    x, usable = uniform(50, 4), bools(50)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(kmeans, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x, 30, usable), kmeans(x, 30, usable))
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes].count("mmvq.spread_rows.default") == 1
    torch.library.opcheck(torch.ops.mmvq.spread_rows.default, (x, usable, 30))
    each = torch.stack([kmeans(rows, 5) for rows in x.view(2, 25, 4)])
    assert torch.equal(torch.vmap(lambda rows: kmeans(rows, 5))(x.view(2, 25, 4)), each)


def test_kmeans_finds_far_clusters_and_keeps_centres_without_rows() -> None:
    corners = 100 * torch.eye(3, dtype=torch.float64)
    x = corners.repeat_interleave(8, 0) + 0.1 * uniform(24, 3)
    found = kmeans(x, 12)
    assert inertia(x, found) < 24 * 3 * 0.1**2  # every row has a centre in its own corner
    same = torch.ones(4, 3, dtype=torch.float64)  # no spread, no jitter: one code takes all rows
    assert torch.equal(kmeans(same, 6), torch.ones(6, 3, dtype=torch.float64))
