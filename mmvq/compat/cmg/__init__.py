"""The released behaviour of Uni-Code (repository haihuangcode/CMG), which differs from the paper's.

Each module has the parameter and buffer names of its released counterpart and computes the same
results, including its defects. `load_checkpoint` loads a released file into these modules, `load`
its codebook into a native quantizer. For new work use `mmvq.MultiModalEMAQuantizer`,
`mmvq.CLUBEstimator` and `mmvq.CrossCPC`.
"""

from mmvq.compat.cmg.checkpoint import CMGCheckpoint, load, load_checkpoint
from mmvq.compat.cmg.club import CMGCLUB
from mmvq.compat.cmg.cpc import CMGCPCOutput, CMGCrossCPC
from mmvq.compat.cmg.encoders import (
    CMGDecoder,
    CMGEncoder,
    CMGHead,
    CMGTemporalEncoder,
    CMGVideoDecoder,
    CMGVideoEncoder,
    CMGVideoPool,
)
from mmvq.compat.cmg.quantizer import CMGQuantizer, CMGQuantizerOutput

__all__ = [
    "CMGCLUB",
    "CMGCPCOutput",
    "CMGCheckpoint",
    "CMGCrossCPC",
    "CMGDecoder",
    "CMGEncoder",
    "CMGHead",
    "CMGQuantizer",
    "CMGQuantizerOutput",
    "CMGTemporalEncoder",
    "CMGVideoDecoder",
    "CMGVideoEncoder",
    "CMGVideoPool",
    "load",
    "load_checkpoint",
]
