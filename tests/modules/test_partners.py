"""Partners of a user's own."""

from __future__ import annotations

import torch
from quantizers import B, D, T, Tensors, batch, some_masks, trained
from support import close, rounding, same, state, uniform
from torch import Tensor, nn

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
