"""The quantizer as a module: every dtype with every feature, and what must not change its state."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from support import DTYPES, bools, close, rounding, uniform, wide
from torch import Tensor, nn

from mmvq import CodeUsage, MultiModalEMAQuantizer, functional, update_codebooks

B, T, D, L = 3, 5, 4, 8
NAMES = ("video", "audio", "text")
Tensors = dict[str, Tensor]


def batch(
    dtype: torch.dtype = torch.float32, seed: int = 0, names: tuple[str, ...] = NAMES
) -> Tensors:
    return {m: uniform(B, T, D, dtype=dtype, seed=seed + 7 * i) for i, m in enumerate(names)}


def some_masks(names: tuple[str, ...] = NAMES) -> Tensors:
    return {m: bools(B, T, seed=i) for i, m in enumerate(names)}


def state(module: nn.Module) -> Tensors:
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a | b)


def trained(**options: Any) -> MultiModalEMAQuantizer:
    """A quantizer that has seen two batches."""
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, **options)
    for seed in (100, 200):
        quantizer(batch(seed=seed))
    return quantizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_dtype_with_every_feature(
    dtype: torch.dtype, partner: Any, gradient: Any, masked: bool
) -> None:
    quantizer = MultiModalEMAQuantizer(
        D, L, NAMES, partner=partner, gradient=gradient, reset_after=1
    )
    masks = some_masks() if masked else None
    for step in range(2):
        z = {m: x.requires_grad_() for m, x in batch(dtype, seed=step).items()}
        quantized, indices, loss = quantizer(z, masks)
        assert list(quantized) == list(indices) == sorted(NAMES)
        for m, x in z.items():
            assert quantized[m].shape == x.shape
            assert quantized[m].dtype == dtype
            assert indices[m].shape == (B, T)
            assert indices[m].dtype == torch.long
        assert loss.shape == ()
        assert loss.dtype == wide(dtype)
        (loss + sum(q.float().square().sum() for q in quantized.values())).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in z.values())
    floats = [x for x in quantizer.state_dict().values() if x.is_floating_point()]
    assert {x.dtype for x in floats} == {wide(dtype)}
    assert all(x.isfinite().all() for x in floats)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cast_module_keeps_a_wide_state(cast: str, when: str) -> None:
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    plain, module = MultiModalEMAQuantizer(D, L, NAMES), MultiModalEMAQuantizer(D, L, NAMES)
    steps = (0, 1, 2)
    for step in steps:
        if (when == "before") == (step == 0):
            getattr(module, cast)()
        z = batch(dtype, seed=step)
        quantized = module(z).quantized
        plain(z)
        assert all(q.dtype == dtype for q in quantized.values())
        assert module.codebook.dtype == wide(dtype)
    assert same(state(module), state(plain))  # a cast changes nothing but the outputs


def test_autocast_changes_no_bit_of_the_state() -> None:
    plain, cast = trained(), trained()
    encoder = nn.Linear(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        z = {m: encoder(x) for m, x in batch().items()}
        assert z["audio"].dtype == torch.bfloat16
        quantized, indices, loss = cast(z)
    expected = plain({m: x.detach() for m, x in z.items()})
    assert same(state(cast), state(plain))
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), expected.loss)
    assert all(torch.equal(indices[m], expected.indices[m]) for m in NAMES)
    assert all(torch.equal(quantized[m].detach(), expected.quantized[m]) for m in NAMES)
    (loss + quantized["audio"].float().sum()).backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.isfinite().all()


@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
def test_one_snapshot_then_one_joint_step(partner: Any) -> None:
    """The whole of Eq. 7 from the references, with masks and a modality of another length."""
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
    expected = functional.ema_update_ref(before["sums"], before["counts"], sums, counts, decay=0.9)
    # up to 45 vectors of entries below 1 into o, and a division by N >= 0.8
    atol = rounding(torch.float64, 50 + 50, 45)
    book = quantizer.ema_codebook
    for value, wanted in zip((book.codes, book.sums, book.counts), expected, strict=True):
        close(value, wanted, atol)
    assert loss == 0


def test_a_callable_partner_and_its_weight() -> None:
    """Weight 1 and a partner that is 3 everywhere: every chosen code is pulled towards 3."""
    seen: list[tuple[set[str], set[str]]] = []

    def three(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
        seen.append((set(others), set(masks)))
        return torch.full_like(z, 3.0)

    quantizer = trained(partner=three, partner_weight=1.0, decay=0.0, reset_after=None, eps=1e-12)
    chosen = torch.cat([i.flatten() for i in quantizer(batch()).indices.values()]).unique()
    close(
        quantizer.codebook[chosen],
        torch.full((len(chosen), D), 3.0),
        rounding(torch.float32, 99, 3),
    )
    assert len(seen) == 3 * 3
    assert all(len(others) == 2 and others == masks for others, masks in seen)


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


@pytest.mark.parametrize(
    "options", [{}, {"partner": "aligned", "reset_after": 1}, {"init": "samples"}]
)
def test_saved_loaded_and_copied_go_on_to_the_bit(options: dict[str, Any], tmp_path: Any) -> None:
    quantizer = trained(**options)
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    loaded, copied = MultiModalEMAQuantizer(D, L, NAMES, **options), deepcopy(quantizer)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3):
        outs = [module(batch(seed=seed), some_masks()) for module in (quantizer, loaded, copied)]
        assert all(torch.equal(outs[0].loss, out.loss) for out in outs)
    assert same(state(quantizer), state(loaded))
    assert same(state(quantizer), state(copied))


def test_names_in_another_order_share_checkpoints() -> None:
    quantizer = trained()
    other = MultiModalEMAQuantizer(D, L, tuple(reversed(NAMES)))
    other.load_state_dict(quantizer.state_dict())
    quantizer(batch())
    other(dict(reversed(batch().items())))
    assert same(state(quantizer), state(other))
    assert list(other.usage().counts) == list(reversed(NAMES))


def test_state_names_and_settings() -> None:
    quantizer = MultiModalEMAQuantizer(D, L)
    fields = ("codes", "sums", "counts", "ages", "usage", "steps", "initialized")
    assert list(quantizer.state_dict()) == [f"ema_codebook.{name}" for name in fields]
    assert list(quantizer.parameters()) == []
    assert quantizer.modalities == ("audio", "video")
    assert quantizer.ema_codebook.process_group is None
    assert "partner='attention', partner_weight=0.5" in repr(quantizer)


@pytest.fixture
def compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("started", [True, False], ids=["trained", "new"])
def test_compiles_into_one_graph(training: bool, started: bool) -> None:
    """From the first batch on, whose data become the codes."""
    make = trained if started else lambda **options: MultiModalEMAQuantizer(D, L, NAMES, **options)
    module = make(gradient="rotation")
    eager = deepcopy(module)
    graph = torch.compile(module.train(training), fullgraph=True, backend="eager")
    eager.train(training)
    for seed in range(3):
        z, twin = batch(seed=seed), batch(seed=seed)
        out = graph({m: x.requires_grad_() for m, x in z.items()}, some_masks())
        expected = eager({m: x.requires_grad_() for m, x in twin.items()}, some_masks())
        out.loss.backward()
        expected.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        for m in NAMES:
            assert torch.equal(out.quantized[m], expected.quantized[m])
            assert torch.equal(out.indices[m], expected.indices[m])
            assert torch.equal(z[m].grad, twin[m].grad)
    assert same(state(module), state(eager))


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


@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
def test_pickles_and_copies(partner: Any) -> None:
    quantizer = trained(partner=partner)
    again = pickle.loads(pickle.dumps(quantizer))
    assert same(state(again), state(quantizer))
    assert torch.equal(again(batch()).loss, quantizer(batch()).loss)


def test_a_callable_partner_is_asked_only_where_there_are_others() -> None:
    def mean_of_others(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
        return torch.stack(list(others.values())).mean(0)

    def overflowing(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
        return z * torch.inf

    alone = {"audio": uniform(B, T, D)}
    asked, plain = trained(partner=mean_of_others), trained(partner="none")
    asked.load_state_dict(plain.state_dict())
    asked(alone)
    plain(alone)
    assert same(state(asked), state(plain))
    unweighted = trained(partner=overflowing, partner_weight=0.0)
    assert same(state(unweighted), state(trained(partner="none")))


def test_a_partner_with_parameters_is_one_part_of_the_module() -> None:
    class Partner(nn.Linear):
        def forward(self, z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
            return super().forward(z)

    quantizer = trained(partner=Partner(D, D))
    names = [name for name in quantizer.state_dict() if name.endswith("weight")]
    assert names == ["partner.weight"]


def test_one_wide_modality_makes_the_state_wide() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    quantizer({"audio": uniform(B, T, D), "video": uniform(B, T, D, dtype=torch.float64)})
    assert quantizer.codebook.dtype == torch.float64


def test_loading_a_state_forgets_what_was_accumulated_for_another() -> None:
    quantizer = trained(update="manual")
    saved = state(quantizer)
    quantizer(batch(seed=5))
    quantizer.load_state_dict(saved)
    quantizer.update_codebook()
    assert same(state(quantizer), saved)
