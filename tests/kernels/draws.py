"""Inputs that tests of the torch paths and of the Triton kernels share."""

from __future__ import annotations

from typing import Any

import torch
from support import bools, uniform
from torch import Tensor

G = 3  # groups of rows
State = tuple[Tensor, Tensor, Tensor]


def assignments(
    N: int, L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices from -1 and groups. Use is skewed: half of the rows choose code 0."""
    generator = torch.Generator().manual_seed(N)
    indices = torch.randint(-1, L, (N,), generator=generator)
    indices = torch.where(torch.rand(N, generator=generator) < 0.5, 0, indices)
    groups = torch.randint(G, (N,), generator=generator)
    return uniform(N, D, dtype=dtype).to(device), indices.to(device), groups.to(device)


def average(L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> State:
    """Codes, sums below 10 and counts of at least 0.5."""
    counts = (uniform(L, seed=1).abs() * 5 + 0.5).to(device, dtype)
    sums = 10 * uniform(L, D, dtype=dtype).to(device)
    return sums / counts[:, None], sums, counts


def batch(
    L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Sums and counts of a step, in which nothing chose code 0."""
    counts = torch.arange(L).remainder(7).to(device, dtype)
    return uniform(L, D, dtype=dtype, seed=3).to(device) * counts[:, None], counts


def faded(state: State, dead: Tensor, mean: float) -> None:
    """Leave the dead codes no sums, and counts of this mean."""
    _, sums, counts = state
    sums[dead] = 0
    counts[dead] = mean * torch.linspace(0.5, 1.5, int(dead.sum())).to(counts)


def operator_calls(device: str = "cpu") -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Calls of the operators of a training step: what is special -> operator, arguments."""
    M, B, T, D, L = 2, 3, 5, 4, 7
    rows, of_codes = (uniform(M * B * T, D, dtype=torch.float32, seed=i).to(device) for i in (0, 1))
    codes = uniform(L, D, dtype=torch.float32, seed=2).to(device)
    chosen, index = codes[torch.arange(M * B * T) % L], torch.arange(M * B * T, device=device) % L
    valid = bools(M * B * T).to(device)
    half, two, small, loss = (torch.tensor(x, device=device) for x in (0.5, 2.0, 1e-5, 3.0))
    weights = uniform(M, M, dtype=torch.float32, seed=3).to(device)
    ages = (torch.arange(M * L, device=device) % 3 - 1).view(M, L)  # some not seen, some expired
    state = *average(L, D, device), ages, ages + 1, torch.tensor(5, device=device)
    sums, counts = batch(L, D, device)
    step = *state, torch.cat([counts, counts.flip(0), sums.flatten()])
    clips = rows.view(M * B, T, D).clone().requires_grad_()
    learned = codes.clone().requires_grad_()
    numbers = half, small
    return {
        "attention": ("mix", (rows, None, B, [0, 1], "attention", 0.5, None)),
        "a temperature": ("mix", (rows, valid, B, [0, 2], "attention", 0.5, 2.0)),
        "aligned": ("mix", (rows, valid, B, [0, 1], "aligned", 0.5, None)),
        "no partner": ("mix", (rows, valid, B, [0, 1], "none", 0.5, None)),
        "one modality": ("mix", (rows, valid, B, [1], "attention", 0.5, None)),
        "half precision": ("mix", (rows.bfloat16(), valid, B, [0, 1], "attention", 0.5, None)),
        "a weight": ("mix_of_tensors", (rows, valid, B, [0, 1], "attention", half, None)),
        "both numbers": ("mix_of_tensors", (rows, None, B, [0, 1], "attention", half, two)),
        "mean": ("quantize", (rows, codes, None, M, 0.5, 0.25, True)),
        "sum, masked": ("quantize", (rows, codes, valid, M, 0.5, 0.25, False)),
        "half precision, codes": ("quantize", (rows.bfloat16(), codes, valid, M, 0.5, 0.25, True)),
        "two weights": ("quantize_of_tensors", (rows, codes, valid, M, two, half, True)),
        "both gradients": (
            "quantize_backward",
            (rows, chosen, None, weights, of_codes, loss, False),
        ),
        "rotation": ("quantize_backward", (rows, chosen, valid, weights, of_codes, loss, True)),
        "of the loss": ("quantize_backward", (rows, chosen, valid, weights, None, loss, True)),
        "of the codes": ("quantize_backward", (rows, chosen, valid, weights, of_codes, None, True)),
        "half precision, gradient": (
            "quantize_backward",
            (rows.bfloat16(), chosen, valid, weights, of_codes.bfloat16(), loss, False),
        ),
        "no reset": ("update_codebook_", (*step, 0.5, 1e-5, None, "all", None)),
        "reset": ("update_codebook_", (*step, 0.5, 1e-5, 2.0, "all", None)),
        "reset, one group": ("update_codebook_", (*step, 0.5, 1e-5, 2.0, "any", [1])),
        "two numbers": ("update_codebook_of_tensors", (*step, *numbers, None, "all", [0])),
        "three numbers": ("update_codebook_of_tensors", (*step, *numbers, two, "any", None)),
        "rows": ("take", (codes, index)),
        "no mask": ("code_log_probabilities", (clips, learned, None)),
    }
