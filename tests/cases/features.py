"""Features and masks: what every module checks of a batch."""

from __future__ import annotations

from cases.form import Case, anything, both, quantizer, whole, z

import mmvq

FEATURES = [
    Case(
        lambda: quantizer()(anything or z),
        TypeError,
        "MultiModalEMAQuantizer: features must be a non-empty mapping from modality to tensor",
        "features: float32[2, 5, 4]",
        'pass {"audio": z_audio, "video": z_video}',
    ),
    Case(
        lambda: mmvq.CrossCPC(4)({}),
        TypeError,
        "CrossCPC: features must be a non-empty mapping from modality to tensor",
        "features: {}",
        'pass {"audio": z_audio, "video": z_video}',
    ),
    Case(
        lambda: quantizer()(both, whole),
        TypeError,
        "MultiModalEMAQuantizer: masks must be a mapping from modality to mask, or None",
        "masks: bool[2, 5]",
        'pass {"audio": mask_audio}; a modality without a mask is valid throughout',
    ),
    Case(
        lambda: quantizer()({"audio": z, "text": z}),
        ValueError,
        "MultiModalEMAQuantizer: features may name only 'audio', 'video'",
        "unknown: ['text']",
        "use the names that the module was built with",
    ),
    Case(
        lambda: quantizer()({"audio": z}, {"video": whole}),
        ValueError,
        "MultiModalEMAQuantizer: masks may name only 'audio'",
        "unknown: ['video']",
        "give a mask only to a modality whose features come in the same call",
    ),
    Case(
        lambda: quantizer()({"audio": z.long()}),
        TypeError,
        "MultiModalEMAQuantizer: features['audio'] must be a floating point tensor",
        "features['audio']: int64[2, 5, 4]",
        "convert it with .float()",
    ),
    Case(
        lambda: quantizer()({"audio": anything or z.numpy()}),
        TypeError,
        "MultiModalEMAQuantizer: features['audio'] must be a floating point tensor",
        "features['audio']: ndarray",
        "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
    ),
    *(
        Case(
            lambda x=x: quantizer()({"audio": x}),
            ValueError,
            "MultiModalEMAQuantizer: features['audio'] must be [B, T, 4] or [B, 4]",
            f"features['audio']: {came}",
            hint,
        )
        for x, came, hint in (
            (
                z[..., :3],
                "float32[2, 5, 3]",
                "project its last dimension to 4, or build the module with dim=3",
            ),
            (z.mT, "float32[2, 4, 5]", "if it is [B, 4, T], pass its transpose(1, 2)"),
            (z[None], "float32[1, 2, 5, 4]", "reshape or pool it to batch, time and width"),
        )
    ),
    Case(
        lambda: mmvq.CrossModalCommitmentLoss()({"audio": z[0, 0]}, {"audio": z[0, 0]}),
        ValueError,
        "CrossModalCommitmentLoss: features['audio'] must be [B, T, D] or [B, D]",
        "features['audio']: float32[4]",
        "reshape or pool it to batch, time and width",
    ),
    Case(
        lambda: quantizer()({"audio": z, "video": z.to("meta")}),
        ValueError,
        "MultiModalEMAQuantizer: all features must be on one device, and the module too",
        "audio: 'cpu'   video: 'meta'   the module: 'cpu'",
        "move them with .to(device)",
    ),
    Case(
        lambda: mmvq.CrossCPC(4)({"audio": z, "video": z.to("meta")}),
        ValueError,
        "CrossCPC: all features must be on one device, and the module too",
        "audio: 'cpu'   video: 'meta'",
        "move them with .to(device)",
    ),
    *(
        Case(
            lambda mask=mask: quantizer()(both, {"video": mask}),
            ValueError,
            "MultiModalEMAQuantizer: masks['video'] must be a bool tensor shaped as its features "
            "without D, on their device",
            f"mask: {came}   features: float32[2, 5, 4]",
            "pass True where a segment is valid, False where it is padding",
        )
        for mask, came in (
            (whole.float(), "float32[2, 5]"),
            (whole[:, :3], "bool[2, 3]"),
            ([True], "[True]"),
            (whole.to("meta"), "bool[2, 5] on meta"),
        )
    ),
    Case(
        lambda: quantizer()({"audio": z, "video": z[:1]}),
        ValueError,
        "MultiModalEMAQuantizer: all modalities must have the same batch size",
        "audio: 2   video: 1",
        "pass clips of one batch; leave out a modality that is missing, or mask it",
    ),
    *(
        Case(
            call,
            ValueError,
            f"{where}: all modalities must have the same number of segments T",
            "audio: 5   video: 3",
            "resample them to one time grid, or pad and mask the shorter" + otherwise,
        )
        for where, call, otherwise in (
            (
                "MultiModalEMAQuantizer",
                lambda: quantizer(partner="aligned")({"audio": z, "video": z[:, :3]}),
                '; or build it with partner="attention"',
            ),
            (
                "CrossModalCommitmentLoss",
                lambda: quantizer()({"audio": z, "video": z[:, :3]}),
                "; or drop the cross term with cross_ratio=0",
            ),
            ("CrossCPC", lambda: mmvq.CrossCPC(4)({"audio": z, "video": z[:, :3]}), ""),
        )
    ),
    *(
        Case(
            lambda name=name: mmvq.CrossCPC(4, (name, "z"))({name: z, "z": z[:, :3]}),
            ValueError,
            "CrossCPC: all modalities must have the same number of segments T",
            f"{name}: 5   z: 3",
            "resample them to one time grid, or pad and mask the shorter",
        )
        for name in ("where", "rule")  # arguments of what checks and composes
    ),
]
