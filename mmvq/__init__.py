"""mmvq: one discrete codebook for several modalities."""

from mmvq import functional
from mmvq.club import CLUBEstimator
from mmvq.codebook import EMACodebook, update_codebooks
from mmvq.cpc import CPCOutput, CrossCPC
from mmvq.functional.usage import CodeUsage
from mmvq.losses import CrossModalCodeMatchingLoss, CrossModalCommitmentLoss
from mmvq.quantizer import MultiModalEMAQuantizer, QuantizerOutput

__version__ = "0.1.0"

__all__ = [
    "CLUBEstimator",
    "CPCOutput",
    "CodeUsage",
    "CrossCPC",
    "CrossModalCodeMatchingLoss",
    "CrossModalCommitmentLoss",
    "EMACodebook",
    "MultiModalEMAQuantizer",
    "QuantizerOutput",
    "functional",
    "update_codebooks",
]
