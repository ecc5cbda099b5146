"""Settings: one place for each, wherever it is read and set, and through schedules and files."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizers import NAMES, D, L, batch, trained
from support import close, rounding, same, state
from torch._dynamo.utils import counters

from mmvq import CrossCPC, CrossModalCommitmentLoss, MultiModalEMAQuantizer

VALUES: dict[str, Any] = {
    "decay": 0.5,
    "eps": 1e-3,
    "reset_after": 7,
    "reset_rule": "any",
    "init": "samples",
}


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_is_one_wherever_it_is_set(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    for where in ("quantizer", "codebook"):
        quantizer = MultiModalEMAQuantizer(D, L, NAMES)
        book = quantizer.ema_codebook
        assert getattr(quantizer, name) == getattr(book, name) != value
        setattr(quantizer if where == "quantizer" else book, name, value)
        assert getattr(quantizer, name) == getattr(book, name) == value
        assert not any(key.endswith(f".{name}") for key in quantizer.state_dict())
        quantizer.save_pretrained(tmp_path / where)
        loaded = MultiModalEMAQuantizer.from_pretrained(tmp_path / where)
        assert getattr(loaded.ema_codebook, name) == value
        assert getattr(deepcopy(quantizer), name) == value


@pytest.mark.parametrize("where", ["quantizer", "codebook"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("decay", 1.5), ("eps", -1.0), ("reset_after", 0), ("reset_rule", "some"), ("init", "zeros")],
)
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(
    where: str, name: str, value: Any
) -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    before = getattr(quantizer, name)
    with pytest.raises(ValueError, match=f"EMACodebook: {name} must be"):
        setattr(quantizer if where == "quantizer" else quantizer.ema_codebook, name, value)
    assert getattr(quantizer, name) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partner", "both"),
        ("partner_weight", 1.5),
        ("partner_temperature", -1.0),
        ("gradient", "rot"),
        ("update", "sometimes"),
    ],
)
def test_settings_of_the_quantizer_alone_are_checked_too(name: str, value: Any) -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    with pytest.raises(ValueError, match=f"MultiModalEMAQuantizer: {name} must be"):
        setattr(quantizer, name, value)
    quantizer(batch())


def test_settings_of_the_losses_are_checked_too() -> None:
    with pytest.raises(ValueError, match="CrossCPC: temperature must be"):
        CrossCPC(D, NAMES).temperature = 0.0
    with pytest.raises(ValueError, match="CrossModalCommitmentLoss: beta must be"):
        CrossModalCommitmentLoss().beta = -1.0


def test_a_setting_takes_effect_at_the_next_step() -> None:
    kept, moved = trained(decay=1.0), trained(decay=1.0)
    moved.decay = 0.0
    kept(batch())
    before = state(moved)["ema_codebook.counts"]
    moved(batch())
    assert torch.equal(state(kept)["ema_codebook.counts"], before)
    usage = moved.ema_codebook.usage.sum(0) - kept.ema_codebook.usage.sum(0)
    assert torch.equal(usage, torch.zeros(L).long())
    assert not torch.equal(moved.ema_codebook.counts, before)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


SCHEDULED = ("decay", "eps", "partner_weight", "partner_temperature", "beta")


@pytest.mark.usefixtures("compiler")
def test_a_schedule_of_all_settings_compiles_twice_at_most() -> None:
    """For the first values, and then for any: to the bit what eager does."""
    quantizer = trained(reset_after=2, partner_temperature=2.0)
    eager = deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    for step in range(5):
        for each in (quantizer, eager):
            for i, name in enumerate(SCHEDULED):
                holder: Any = each.commitment if name == "beta" else each
                setattr(holder, name, 0.9 - step / 10 - i / 50)
            each.reset_after = step + 1
        z = batch(seed=step)
        assert torch.equal(compiled(z).loss, eager(z).loss)
        assert same(state(quantizer), state(eager))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.usefixtures("compiler")
def test_a_schedule_of_the_temperature_of_cpc_compiles_twice_at_most() -> None:
    cpc, z = CrossCPC(D, NAMES), batch()
    compiled = torch.compile(cpc, fullgraph=True, backend="eager")
    for step in range(5):
        cpc.temperature = 0.1 + step / 10
        with torch._dynamo.config.patch(allow_rnn=True):
            loss = compiled(z, start="all").loss
        assert torch.equal(loss, cpc(z, start="all").loss)
    assert counters["stats"]["unique_graphs"] <= 2


def test_the_settings_of_cross_cpc_show() -> None:
    text = repr(CrossCPC(D, NAMES, temperature=0.1, normalize=True, num_steps=2))
    for setting in ("temperature=0.1", "normalize=True", "num_steps=2", "normalize_over='targets'"):
        assert setting in text


@pytest.mark.usefixtures("compiler")
def test_a_compiled_step_undoes_a_cast_that_it_was_not_told_of() -> None:
    """As FSDP1 casts buffers: once, behind the module's back. The graph gives way to eager code."""
    cast, plain = trained(decay=0.999), trained(decay=0.999)
    compiled = torch.compile(cast, backend="eager")
    for step in range(3):
        if step == 1:
            for buffer in cast.buffers():
                if buffer.is_floating_point():
                    buffer.data = buffer.to(torch.bfloat16)
        compiled(batch(seed=step))
        plain(batch(seed=step))
        assert cast.codebook.dtype == torch.float32
    for name, x in state(plain).items():
        close(state(cast)[name], x, rounding(torch.float32, 100, 50))
