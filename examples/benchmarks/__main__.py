"""`python -m examples.benchmarks [search|step|losses|memory|gpu]`: a table, and JSON."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # they slow faiss; read once, at import
    os.environ.pop(_name, None)

from .command import main  # noqa: E402

main()
