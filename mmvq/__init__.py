"""mmvq: a shared discrete codebook for several modalities."""

from mmvq import averaging, figures, functional
from mmvq.club import CLUBEstimator
from mmvq.codebook import EMACodebook, update_codebooks
from mmvq.cpc import CPCOutput, CrossCPC
from mmvq.functional.usage import CodeUsage
from mmvq.losses import CrossModalCodeMatchingLoss, CrossModalCommitmentLoss
from mmvq.monitor import CodebookMonitor, HealthWarning
from mmvq.quantizer import MultiModalEMAQuantizer, QuantizerOutput

__version__ = "0.1.0"

__all__ = [
    "CLUBEstimator",
    "CPCOutput",
    "CodeUsage",
    "CodebookMonitor",
    "CrossCPC",
    "CrossModalCodeMatchingLoss",
    "CrossModalCommitmentLoss",
    "EMACodebook",
    "HealthWarning",
    "MultiModalEMAQuantizer",
    "QuantizerOutput",
    "averaging",
    "figures",
    "functional",
    "update_codebooks",
]
