"""Partners of a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantizers import B, D, T, Tensors, batch, some_masks, trained
from support import close, rounding, same, state, uniform
from torch import Tensor, nn

from mmvq import MultiModalEMAQuantizer
from mmvq.functional import cross_attend
from mmvq.partners import mix_partners


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


def test_the_temperature_reaches_the_attention_alone() -> None:
    z, masks = batch(), some_masks()
    for temperature in (None, 0.3):
        mixed = mix_partners(z, masks, "attention", 0.5, temperature)
        for name, x in z.items():
            others = {other: z[other] for other in z if other != name}
            r = cross_attend(x, others, masks, temperature=temperature)
            close(mixed[name], (x + r) / 2, rounding(x.dtype, 3))
    assert not same(mixed, mix_partners(z, masks, "attention", 0.5))
    aligned = mix_partners(z, masks, "aligned", 0.5, 0.3)
    assert same(aligned, mix_partners(z, masks, "aligned", 0.5))


@pytest.mark.parametrize(("assignment", "counts"), [("own", [1.0, 0.0, 1.0]), ("mixed", [0, 2, 0])])
def test_a_mixture_enters_the_code_of_its_vector_or_its_own(
    assignment: Any, counts: list[float]
) -> None:
    """Vectors at 0 and 2, each with a code, and a third code at their mean, by hand."""
    quantizer = MultiModalEMAQuantizer(
        1, 3, ("audio", "video"), partner="aligned", assignment=assignment, decay=0.0, eps=0.0
    )
    quantizer.set_codes(torch.tensor([[0.0], [1.1], [2.0]]))
    z = {"audio": torch.tensor([[0.0]]), "video": torch.tensor([[2.0]])}
    indices = quantizer(z).indices
    assert (indices["audio"].item(), indices["video"].item()) == (0, 2)
    assert quantizer.ema_codebook.counts.tolist() == counts
    moved = torch.tensor(
        [[1.0] if n else [e] for n, e in zip(counts, (0.0, 1.1, 2.0), strict=True)]
    )
    close(quantizer.codebook, moved, 1e-6)
    assert {m: n.tolist() for m, n in quantizer.usage().counts.items()} == {
        "audio": [1, 0, 0],
        "video": [0, 0, 1],
    }


def test_mixed_assignment_is_kept_by_files_and_growth(tmp_path: Path) -> None:
    names = ("video", "audio")
    quantizer = MultiModalEMAQuantizer(6, 8, names, assignment="mixed", update_from=("audio",))
    for step in range(3):
        quantizer({name: uniform(8, 5, 6, seed=step) for name in names})
    assert quantizer.update_from == ("audio",)
    assert quantizer.ema_codebook.ages.shape == (4, 8)
    quantizer.save_pretrained(tmp_path)
    loaded = MultiModalEMAQuantizer.from_pretrained(tmp_path)
    assert (loaded.assignment, loaded.update_from) == ("mixed", ("audio",))
    wider = loaded.extended(modalities=("text", *names), codebook_size=9)
    assert wider.assignment == "mixed"
    assert wider.ema_codebook.usage.shape == (6, 9)
    for name in names:
        assert torch.equal(wider.usage().counts[name][:8], quantizer.usage().counts[name])
    assert not wider.usage().counts["text"].any()
    with pytest.raises(ValueError, match=r"assignment must be .*'own', 'mixed'"):
        MultiModalEMAQuantizer(6, 8, names, assignment="mean")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        wider.assignment = "own"  # type: ignore[misc]
