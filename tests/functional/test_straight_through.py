"""The code forward; the identity, or a rotation, backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import DTYPES, close, rounding, strided, uniform
from torch import Tensor

from mmvq.functional import rotate, straight_through

BOTH = pytest.mark.parametrize("gradient", [straight_through, rotate])
Gradient = Callable[[Tensor, Tensor], Tensor]


def rotation(z: Tensor, e: Tensor) -> Tensor:
    """The matrix of the paper for one pair: turns z onto e and scales it."""
    z_hat, e_hat = z / z.norm(), e / e.norm()
    u = (e_hat + z_hat) / (e_hat + z_hat).norm()
    matrix = (
        torch.eye(len(z), dtype=z.dtype) - 2 * torch.outer(u, u) + 2 * torch.outer(e_hat, z_hat)
    )
    return e.norm() / z.norm() * matrix


def pull_back(gradient: Gradient, z: Tensor, codes: Tensor, seed: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(gradient(z, codes), z, seed)
    return grad


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)])
def test_forward_is_the_code_to_the_bit(
    gradient: Gradient, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    z, codes = uniform(*shape, dtype=dtype), uniform(*shape, dtype=dtype, seed=1)
    out = gradient(z, codes)
    assert out.dtype == dtype
    assert torch.equal(out, codes)
    if z.ndim > 1:
        assert torch.equal(gradient(strided(z), strided(codes)), codes)


@BOTH
def test_codes_get_no_gradient_and_nan_shows(gradient: Gradient) -> None:
    z, codes = uniform(3, 4).requires_grad_(), uniform(3, 4, seed=1).requires_grad_()
    gradient(z, codes).sum().backward()
    assert z.grad is not None
    assert codes.grad is None
    bad = z.detach().clone()
    bad[1, 2] = torch.nan
    out = gradient(bad, codes)
    assert out[1].isnan().any()
    assert torch.equal(out[[0, 2]], codes[[0, 2]])


@BOTH
def test_the_output_is_memory_of_its_own(gradient: Gradient) -> None:
    z, codes = uniform(3, 4).requires_grad_(), uniform(3, 4, seed=1)
    before = codes.clone()
    gradient(z, codes).mul_(2).sum().backward()
    assert torch.equal(codes, before)
    assert z.grad is not None


def test_codes_alone_are_constants() -> None:
    codes = uniform(3, 4, seed=1).requires_grad_()
    assert not straight_through(uniform(3, 4), codes).requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_straight_through_in_forward_mode_and_twice() -> None:
    z, codes, v = (uniform(3, 4, seed=i) for i in range(3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, v)
        out = torch.autograd.forward_ad.unpack_dual(straight_through(dual, codes))
    assert torch.equal(out.tangent, v)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(straight_through(z, codes).square().sum(), z, create_graph=True)
    assert torch.equal(grad, 2 * codes)
    (again,) = torch.autograd.grad(grad.sum(), z)
    assert torch.equal(again, torch.full_like(z, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_gradient_is_the_identity(dtype: torch.dtype) -> None:
    z, codes, seed = (uniform(3, 4, dtype=dtype, seed=i) for i in range(3))
    assert torch.equal(pull_back(straight_through, z, codes, seed), seed)


def test_rotation_is_the_matrix() -> None:
    z, codes, seed = (uniform(5, 4, seed=i) for i in range(3))
    grad = pull_back(rotate, z, codes, seed)
    # |e| / |z| is below 20 in this draw; about 10 D roundings of that each way
    atol = rounding(z.dtype, 80, 20)
    for i in range(len(z)):
        matrix = rotation(z[i], codes[i])
        close(matrix @ z[i], codes[i], atol)
        close(grad[i], matrix.T @ seed[i], atol)
        close(grad[i].norm(), seed[i].norm() * codes[i].norm() / z[i].norm(), atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**-14, 1.0, 2.0**14])
def test_rotation_of_narrow_vectors_of_any_norm(dtype: torch.dtype, scale: float) -> None:
    """64 entries of up to 2^14 have a norm that float16 does not; the gradient is rounded once."""
    z, codes = ((scale * uniform(5, 64, seed=i)).to(dtype).requires_grad_() for i in range(2))
    out = rotate(z, codes)
    assert torch.equal(out, codes)
    (found,) = torch.autograd.grad(out, z, torch.ones_like(out))
    exact = z.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(rotate(exact, codes.double()).sum(), exact)
    close(found, wanted, rounding(dtype, 1, wanted.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_where_it_is_not_defined_is_straight_through(dtype: torch.dtype) -> None:
    z, codes, seed = (uniform(3, 4, dtype=dtype, seed=i) for i in range(3))
    z[0], codes[1], codes[2] = 0, 0, -z[2]
    assert torch.equal(pull_back(rotate, z, codes, seed), seed)
    assert torch.equal(rotate(z, codes), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rotation_whose_scale_overflows_is_straight_through(dtype: torch.dtype) -> None:
    """Both norms are ordinary numbers, their ratio is not: times 0 it would make NaN."""
    info = torch.finfo(dtype)
    z = torch.full((3, 4), info.tiny**0.5 / 256, dtype=dtype)
    codes = torch.full((3, 4), info.max**0.5 / 16, dtype=dtype)
    assert (z.norm(dim=1) > info.tiny).all()
    assert (codes.norm(dim=1) / z.norm(dim=1)).isinf().all()
    seed = uniform(3, 4, dtype=dtype)
    assert torch.equal(pull_back(rotate, z, codes, seed), seed)
    assert torch.equal(rotate(z, codes), codes)
