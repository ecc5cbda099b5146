"""Nearest-code search, code statistics, EMA update and code distribution, optimised.

The functions work on flat tensors, know nothing of modules or modalities, and never import `mmvq`.
Each file has a plain reference, the public function, which checks its arguments, the torch path
(`search_torch`), and the operation without checks (`search`), which `mmvq` calls. The Triton
kernels of a file are in the file of the same name in `mmvq_kernels/gpu`.
"""

from mmvq_kernels.backends import Backend, available_backends, reason_unavailable
from mmvq_kernels.distribution import code_log_probabilities
from mmvq_kernels.ema import ema_update_
from mmvq_kernels.nearest import nearest_code
from mmvq_kernels.statistics import code_statistics

__all__ = [
    "Backend",
    "available_backends",
    "code_log_probabilities",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "reason_unavailable",
]
