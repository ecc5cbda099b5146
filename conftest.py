"""What every test and every example in a docstring finds ready."""

from __future__ import annotations

import pytest
import torch

import mmvq
import mmvq_kernels

collect_ignore_glob = ["mmvq_kernels/gpu/*"]  # importing them imports triton


@pytest.fixture(autouse=True)
def ready(doctest_namespace: dict[str, object]) -> None:
    """Seed torch; let docstrings use torch and the public names without importing them."""
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
    for package in (mmvq_kernels, mmvq):
        doctest_namespace.update({name: getattr(package, name) for name in package.__all__})
