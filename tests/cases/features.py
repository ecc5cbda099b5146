"""Features and masks: what every module checks of a batch."""

from __future__ import annotations

from cases.form import both, of_each, quantizer, refused, whole, z

import mmvq

QUANTIZER = "MultiModalEMAQuantizer"

FEATURES = [
    refused(
        TypeError,
        f"{QUANTIZER}: features must be a non-empty mapping from modality to tensor",
        *of_each(lambda given: quantizer()(given), z, {}),
    ),
    refused(
        TypeError,
        f"{QUANTIZER}: masks must be a mapping from modality to mask, or None",
        lambda: quantizer()(both, whole),
    ),
    refused(
        ValueError,
        f"{QUANTIZER}: features may name only 'audio', 'video'",
        lambda: quantizer()({"audio": z, "text": z}),
    ),
    refused(
        ValueError,
        f"{QUANTIZER}: masks may name only 'audio'",
        lambda: quantizer()({"audio": z}, {"video": whole}),
    ),
    *(
        refused(
            TypeError,
            f"{QUANTIZER}: features['audio'] must be a floating point tensor",
            lambda x=x: quantizer()({"audio": x}),
            hint=hint,
        )
        for x, hint in ((z.long(), ".float()"), (z.numpy(), "torch.from_numpy"))
    ),
    *(
        refused(
            ValueError,
            f"{QUANTIZER}: features['audio'] must be [B, T, 4] or [B, 4]",
            lambda x=x: quantizer()({"audio": x}),
            hint=hint,
        )
        for x, hint in (
            (z[..., :3], "dim=3"),
            (z[0, :, :3], "dim=3"),
            (z.mT, "transpose(1, 2)"),
            (z[None], "batch, time"),
        )
    ),
    refused(
        ValueError,
        "CrossModalCommitmentLoss: features['audio'] must be [B, T, D] or [B, D]",
        lambda: mmvq.CrossModalCommitmentLoss()({"audio": z[0, 0]}, {"audio": z[0, 0]}),
    ),
    *(
        refused(
            ValueError,
            f"{where}: all features must be on one device, and the module too",
            lambda make=make: make()({"audio": z, "video": z.to("meta")}),
        )
        for where, make in ((QUANTIZER, quantizer), ("CrossCPC", lambda: mmvq.CrossCPC(4)))
    ),
    refused(
        ValueError,
        f"{QUANTIZER}: masks['video'] must be a bool tensor shaped as its features without D, on "
        "their device",
        *of_each(
            lambda mask: quantizer()(both, {"video": mask}),
            *(whole.float(), whole[:, :3], [True], whole.to("meta")),
        ),
    ),
    refused(
        ValueError,
        f"{QUANTIZER}: all modalities must have the same batch size",
        lambda: quantizer()({"audio": z, "video": z[:1]}),
    ),
    *(
        refused(
            ValueError,
            f"{where}: all modalities must have the same number of segments T",
            lambda make=make, name=name: make(name)({name: z, "video": z[:, :3]}),
            hint=hint,
        )
        for where, name, make, hint in (
            (QUANTIZER, "audio", lambda _: quantizer(partner="aligned"), 'partner="attention"'),
            ("CrossModalCommitmentLoss", "audio", lambda _: quantizer(), "cross_ratio=0"),
            # names that what checks and composes has as arguments
            ("CrossCPC", "where", lambda name: mmvq.CrossCPC(4, (name, "video")), "shorter."),
            ("CrossCPC", "rule", lambda name: mmvq.CrossCPC(4, (name, "video")), "shorter."),
        )
    ),
]
