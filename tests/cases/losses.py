"""Losses, CLUB and Cross-CPC."""

from __future__ import annotations

from unittest.mock import patch

from cases.form import (
    Call,
    anything,
    both,
    checked,
    codes,
    nan,
    of_each,
    quantizer,
    refused,
    whole,
    z,
)

import mmvq


def split(call: Call) -> Call:
    """The call on rank 0 of two, of which rank 1 has another T."""

    def exchange(numbers: list[int], *_: object) -> list[list[int]]:
        return [numbers, [*numbers[:-1], numbers[-1] + 1]]

    def run() -> object:
        with (
            patch("mmvq.distributed.world_size", lambda group: 2),
            patch("mmvq.distributed.exchange", exchange),
        ):
            return call()

    return run


def club() -> mmvq.CLUBEstimator:
    return mmvq.CLUBEstimator(4, 4)


LOSSES = [
    refused(
        ValueError,
        "info_nce: query and key must be [..., N, D], with the same N and D",
        *of_each(lambda key: mmvq.functional.info_nce(z[:, 0], key), z[:1, 0], z[:, 0, :3]),
    ),
    refused(
        ValueError,
        "CrossCPC: T must be the same on all ranks",
        # 1 is too short; but where only one rank knows, the others wait
        *(split(lambda T=T: mmvq.CrossCPC(4, gather=True)({"audio": z[:, :T]})) for T in (5, 1)),
    ),
    refused(
        ValueError,
        "CrossModalCommitmentLoss: codes must have the same names and shapes as features",
        *of_each(
            lambda given: mmvq.CrossModalCommitmentLoss()(both, given),
            *({"audio": z}, {"audio": z, "video": codes}, z, {"audio": z, "video": [0]}),
        ),
    ),
    *(
        refused(
            ValueError,
            f"CrossModalCodeMatchingLoss: the codebook of {name!r} must be [L, 4], floating point, "
            "on the device of the features",
            *of_each(lambda given: mmvq.CrossModalCodeMatchingLoss()(both, given), *codebooks),
        )
        for name, *codebooks in (
            ("audio", codes[:, :3], codes.long(), codes.to("meta"), anything or quantizer()),
            ("video", {"audio": codes}),
        )
    ),
    refused(
        ValueError,
        "CrossModalCodeMatchingLoss: codebooks must have the same size, as they are tied by index",
        lambda: mmvq.CrossModalCodeMatchingLoss()(both, {"audio": codes, "video": codes[:7]}),
    ),
    refused(
        ValueError,
        "CLUBEstimator: x must be [B, T, 4] and y [B, T, 3], or both without T",
        *of_each(
            lambda xy: mmvq.CLUBEstimator(4, 3)(*xy),
            *((z[..., :3], z), (z, z[:1, :, :3]), (z[0, 0], z[0, 0, :3])),
        ),
        lambda: mmvq.CLUBEstimator(4, 3).penalty(z, z),
    ),
    *(
        refused(TypeError, f"CLUBEstimator: {name} must be a floating point tensor", *calls)
        for name, *calls in (
            ("x", lambda: club()(z.numpy(), z), lambda: club().learning_loss(z.numpy(), z)),
            ("y", *(lambda f=f: f(z, z.numpy()) for f in (club().log_likelihood, club().penalty))),
        )
    ),
    refused(
        ValueError,
        "CLUBEstimator: mask must be a bool tensor shaped as its features without D, on their "
        "device",
        *of_each(lambda mask: club().learning_loss(z, z, mask), whole.float(), whole[:1], [True]),
    ),
    refused(
        ValueError,
        "CrossCPC: T must be at least min_context + first_step + num_steps - 1",
        lambda: mmvq.CrossCPC(4, num_steps=4, first_step=2, min_context=2)(both),
    ),
    refused(
        ValueError,
        'CrossCPC: start must be in [2, 4], "all" or None',
        *of_each(lambda t: mmvq.CrossCPC(4, min_context=2)(both, start=t), 1, 5, 2.5, "some"),
    ),
    *(
        refused(ValueError, f"{where}: {name} must be finite", checked(call))
        for where, name, call in (
            ("MultiModalEMAQuantizer", "audio", lambda: quantizer()({"audio": nan})),
            (
                "CrossModalCommitmentLoss",
                "audio",
                lambda: mmvq.CrossModalCommitmentLoss()({"audio": nan}, {"audio": z}),
            ),
            (
                "CrossModalCodeMatchingLoss",
                "audio",
                lambda: mmvq.CrossModalCodeMatchingLoss()({"audio": nan}, codes),
            ),
            ("CrossCPC", "audio", lambda: mmvq.CrossCPC(4)({"audio": nan})),
            ("CLUBEstimator", "x", lambda: club()(nan, z)),
            ("CLUBEstimator", "y", lambda: club()(z, nan)),
            ("CLUBEstimator", "y", lambda: club().penalty(z, nan)),
        )
    ),
]
