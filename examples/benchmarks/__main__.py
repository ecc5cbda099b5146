"""`python -m examples.benchmarks [search|step|losses|memory|gpu|plot]`: a table, and JSON."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # they slow the peers; read at import
    os.environ.pop(_name, None)

import torch  # noqa: E402

# The OpenBLAS inside faiss takes a processor newer than itself for one without AVX: four times
# slower at D 256. It is told what torch sees.
_CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
if _core := _CORES.get(torch.backends.cpu.get_cpu_capability()):
    os.environ["OPENBLAS_CORETYPE"] = _core

from .command import main  # noqa: E402

main()
