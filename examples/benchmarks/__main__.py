"""`python -m examples.benchmarks [search|step|losses|memory|data|gpu|plot|launches]`."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # slow; read at import
    os.environ.pop(_name, None)

import torch  # noqa: E402

# The OpenBLAS in faiss does not recognise newer processors and then does without AVX, which is four
# times slower at D = 256. So set the instruction set that torch has detected.
_CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
if _core := _CORES.get(torch.backends.cpu.get_cpu_capability()):
    os.environ["OPENBLAS_CORETYPE"] = _core

from .command import main  # noqa: E402

main()
