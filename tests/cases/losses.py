"""Losses, CLUB and Cross-CPC."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

from cases.form import Case, anything, both, codes, finite, nan, quantizer, whole, z

import mmvq


def split(call: Callable[[], object]) -> Callable[[], object]:
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


LOSSES = [
    *(
        Case(
            lambda key=key: mmvq.functional.info_nce(z[:, 0], key),
            ValueError,
            "info_nce: query and key must be [..., N, D], of one N and one D",
            f"query: float32[2, 4]   key: float32{list(key.shape)}",
            "row i of key belongs to row i of query; project both to one width",
        )
        for key in (z[:1, 0], z[:, 0, :3])
    ),
    *(
        Case(
            split(lambda T=T: mmvq.CrossCPC(4, gather=True)({"audio": z[:, :T]})),
            ValueError,
            "CrossCPC: T must be the same on all ranks",
            f"T of this rank: {T}   ranks_unlike_rank_0: [1]",
            "pass zeros with a mask of False for what a rank lacks",
        )
        for T in (5, 1)  # 1 is too short, but where only one rank knows, the others wait
    ),
    Case(
        lambda: mmvq.CLUBEstimator(4, 4, negatives="shuffled", gather=True),
        ValueError,
        'CLUBEstimator: gather=True needs negatives="all"',
        "negatives: 'shuffled'   gather: True",
        "leave one of the two at its default",
    ),
    *(
        Case(
            lambda ratio=ratio: mmvq.CrossModalCommitmentLoss(cross_ratio=ratio),
            ValueError,
            "CrossModalCommitmentLoss: cross_ratio must be a number, or map pairs of modalities to "
            "numbers",
            f"cross_ratio: {ratio!r}",
            'pass {("audio", "video"): 0.5} to pull audio towards the codes of video',
        )
        for ratio in ({"audio": 0.5}, {("audio", "audio"): 0.5}, {("a", "b", "c"): 0.5})
    ),
    *(
        Case(
            lambda given=given: mmvq.CrossModalCommitmentLoss()(both, given),
            ValueError,
            "CrossModalCommitmentLoss: codes must have the names and shapes of features",
            "features: {'audio': float32[2, 5, 4], 'video': float32[2, 5, 4]}   codes: " + came,
            "pass the code of every feature, codebook[indices]",
        )
        for given, came in (
            ({"audio": z}, "{'audio': float32[2, 5, 4]}"),
            (
                {"audio": z, "video": codes},
                "{'audio': float32[2, 5, 4], 'video': float32[8, 4]}",
            ),
            (z, "float32[2, 5, 4]"),
            ({"audio": z, "video": [0]}, "{'audio': float32[2, 5, 4], 'video': [0]}"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.CrossModalCodeMatchingLoss()(both, given),
            ValueError,
            f"CrossModalCodeMatchingLoss: the codebook of {name!r} must be [L, 4], floating point, "
            "on the device of the features",
            f"features: float32[2, 5, 4]   codebook: {came}",
            "pass quantizer.codebook, or one codebook for each modality",
        )
        for given, name, came in (
            (codes[:, :3], "audio", "float32[8, 3]"),
            (codes.long(), "audio", "int64[8, 4]"),
            (codes.to("meta"), "audio", "float32[8, 4] on meta"),
            ({"audio": codes}, "video", "None"),
            (anything or quantizer(), "audio", "MultiModalEMAQuantizer"),
        )
    ),
    Case(
        lambda: mmvq.CrossModalCodeMatchingLoss()(both, {"audio": codes, "video": codes[:7]}),
        ValueError,
        "CrossModalCodeMatchingLoss: codebooks must have the same size, as they are tied by index",
        "audio: float32[8, 4]   video: float32[7, 4]",
        "build them with one size",
    ),
    *(
        Case(
            lambda x=x, y=y: mmvq.CLUBEstimator(4, 3)(x, y),
            ValueError,
            "CLUBEstimator: x must be [B, T, 4] and y [B, T, 3], or both without T",
            came,
            "give both one B and T; swap them if they came reversed: q predicts y",
        )
        for x, y, came in (
            (z[..., :3], z, "x: float32[2, 5, 3]   y: float32[2, 5, 4]"),
            (z, z[:1, :, :3], "x: float32[2, 5, 4]   y: float32[1, 5, 3]"),
            (z[0, 0], z[0, 0, :3], "x: float32[4]   y: float32[3]"),
        )
    ),
    *(
        Case(
            lambda call=call: call(mmvq.CLUBEstimator(4, 4)),
            TypeError,
            f"CLUBEstimator: {name} must be a floating point tensor",
            f"{name}: ndarray",
            "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
        )
        for name, call in (
            ("x", lambda club: club(z.numpy(), z)),
            ("y", lambda club: club.log_likelihood(z, z.numpy())),
            ("x", lambda club: club.learning_loss(z.numpy(), z)),
        )
    ),
    *(
        Case(
            lambda mask=mask: mmvq.CLUBEstimator(4, 4).learning_loss(z, z, mask),
            ValueError,
            "CLUBEstimator: mask must be a bool tensor shaped as its features without D, on their "
            "device",
            f"mask: {came}   features: float32[2, 5, 4]",
            "pass True where a segment is valid, False where it is padding",
        )
        for mask, came in (
            (whole.float(), "float32[2, 5]"),
            (whole[:1], "bool[1, 5]"),
            ([True], "[True]"),
        )
    ),
    Case(
        lambda: mmvq.CrossCPC(4, num_steps=4, first_step=2, min_context=2)(both),
        ValueError,
        "CrossCPC: T must be at least min_context + first_step + num_steps - 1",
        "T: 5   min_context: 2   first_step: 2   num_steps: 4",
        "pass longer clips, or predict fewer steps ahead",
    ),
    *(
        Case(
            lambda start=start: mmvq.CrossCPC(4, min_context=2)(both, start=start),
            ValueError,
            'CrossCPC: start must lie in [2, 4], or be "all" or None',
            f"start: {start!r}",
            "it counts the observed segments",
        )
        for start in (1, 5, 2.5, "some")
    ),
    finite(
        "CrossModalCommitmentLoss",
        lambda: mmvq.CrossModalCommitmentLoss()({"audio": nan}, {"audio": z}),
    ),
    finite(
        "CrossModalCodeMatchingLoss",
        lambda: mmvq.CrossModalCodeMatchingLoss()({"audio": nan}, codes),
    ),
    finite("CrossCPC", lambda: mmvq.CrossCPC(4)({"audio": nan})),
    finite("CLUBEstimator", lambda: mmvq.CLUBEstimator(4, 4)(nan, z), "x"),
    finite("CLUBEstimator", lambda: mmvq.CLUBEstimator(4, 4)(z, nan), "y"),
]
