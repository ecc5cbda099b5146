"""The equations of the paper as pure functions, with slow and simple `*_ref` versions."""

from mmvq.functional.attention import aligned_partner, cross_attend, cross_attend_ref
from mmvq.functional.batch import WHOLE, Batch
from mmvq.functional.club import (
    club,
    club_penalty,
    club_penalty_ref,
    club_ref,
    club_shuffled,
    gaussian_log_likelihood,
)
from mmvq.functional.commitment import commitment, commitment_ref, commitment_terms
from mmvq.functional.contrastive import info_nce, info_nce_ref, similarities, top1_hits
from mmvq.functional.ema import ema_update_, ema_update_ref, laplace_smoothing
from mmvq.functional.initial import kmeans, sample_rows
from mmvq.functional.matching import (
    code_log_probabilities,
    code_matching,
    code_matching_ref,
    code_probabilities,
)
from mmvq.functional.nearest import nearest_code, nearest_code_ref
from mmvq.functional.reset import (
    UNSEEN,
    advance_ages,
    dead_codes,
    jittered,
    replacement_codes,
)
from mmvq.functional.statistics import code_statistics, code_statistics_ref, finite_rows
from mmvq.functional.straight_through import rotate, straight_through
from mmvq.functional.usage import CodeAgreement, CodeUsage, code_agreement, code_usage
from mmvq_kernels.deprecation import renamed

__all__ = [
    "UNSEEN",
    "WHOLE",
    "Batch",
    "CodeAgreement",
    "CodeUsage",
    "advance_ages",
    "aligned_partner",
    "club",
    "club_penalty",
    "club_penalty_ref",
    "club_ref",
    "club_shuffled",
    "code_agreement",
    "code_log_probabilities",
    "code_matching",
    "code_matching_ref",
    "code_probabilities",
    "code_statistics",
    "code_statistics_ref",
    "code_usage",
    "commitment",
    "commitment_ref",
    "commitment_terms",
    "cross_attend",
    "cross_attend_ref",
    "dead_codes",
    "ema_update_",
    "ema_update_ref",
    "finite_rows",
    "gaussian_log_likelihood",
    "info_nce",
    "info_nce_ref",
    "jittered",
    "kmeans",
    "laplace_smoothing",
    "nearest_code",
    "nearest_code_ref",
    "replacement_codes",
    "rotate",
    "sample_rows",
    "similarities",
    "straight_through",
    "top1_hits",
]


def __getattr__(name: str) -> object:
    return renamed(__name__, name, inactive_codes=dead_codes, matched=top1_hits)
