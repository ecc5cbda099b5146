"""The table of docs/kernels.md: the share of rows that get another code than in float64.

TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m kernels.interpreter.exactness
"""

from __future__ import annotations

import pytest
import torch
from kernels.interpreter import mend
from torch import Tensor

from mmvq_kernels.gpu.nearest import search
from mmvq_kernels.nearest import nearest_code, nearest_code_ref

N, L, D, DRAWS = 512, 512, 256, 3
DATA = (
    "Gaussian",
    "mean offset 10",
    "collapsed",
    "one code far away",
    "each code twice",
    "lattice",
)
HEAD = ("data", "torch path", "exact", "`fast`", "bf16 x, exact", "bf16 x, `fast`")


def draw(data: str, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors and codes."""
    generator = torch.Generator().manual_seed(seed)
    x, codebook = torch.randn(N, D, generator=generator), torch.randn(L, D, generator=generator)
    point = torch.randn(D, generator=generator)
    if data == "mean offset 10":
        return x + 10, codebook + 10
    if data == "collapsed":
        return point + 1e-2 * x, point + 1e-2 * codebook
    if data == "one code far away":
        codebook[min(seed * L // 2, L - 1)] *= 1e6  # the first, the middle, the last
    if data == "each code twice":
        codebook = codebook[torch.randint(L // 2, (L,), generator=generator)]
    if data == "lattice":  # of few columns that differ, so that many codes are equally near
        x, codebook = x[:, :4].repeat(1, D // 4), codebook[:, :4].repeat(1, D // 4)
        return (2 * x).round() / 2, codebook.round()
    return x, codebook


def shares(data: str) -> list[float]:
    """The columns, as means over the draws."""
    wrong = []
    for seed in range(DRAWS):
        x, codebook = draw(data, seed)
        found = [(x, nearest_code(x, codebook, backend="torch"))]
        for rows in (x, x.bfloat16()):
            found += [(rows, search(rows, codebook, fast=fast)) for fast in (False, True)]
        wrong.append([(index != nearest_code_ref(rows, codebook)).sum() for rows, index in found])
    return (torch.tensor(wrong).double().mean(0) / N).tolist()


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        mend.mend(patch)
        print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
        for name in DATA:
            print(f"| {name} | {' | '.join(f'{share:.2%}' for share in shares(name))} |")
