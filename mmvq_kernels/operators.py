"""Registration of an operation as a torch custom operator, in one call.

A compiled or exported graph then holds the operator, which chooses between the Triton kernels and
the torch path when it runs.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from mmvq_kernels.backends import runs_triton, transformed
from mmvq_kernels.messages import message

P = ParamSpec("P")
R = TypeVar("R")


def register(
    name: str,
    torch_path: Callable[Concatenate[Tensor, P], R],
    *,
    gpu: str | None = None,
    fake: Callable[..., object] | None = None,
    mutates_args: Sequence[str] = (),
) -> Callable[Concatenate[Tensor, P], R]:
    """Make a custom operator of `torch_path`, whose annotations become the operator's schema.

    Args:
        name: name of the operator, `namespace::name`.
        torch_path: the operation in torch; its first argument is a tensor.
        gpu: the same function in Triton, `module:name`; imported at its first use, as importing it
            imports triton. None: there is none.
        fake: takes the same arguments and returns empty tensors of the results' shapes and dtypes.
            Not needed by an operator that returns nothing.
        mutates_args: the arguments that are written to. Without any, `torch.vmap` gets a rule.

    Returns:
        The operation, without any check of its arguments. Eager on a CPU, it calls `torch_path`
        itself, as the first call of an operator imports torch's compiler; otherwise the operator.
        RuntimeError under `torch.jit.trace`, which would record the choices of one input.
    """

    def run(*args: Any) -> Any:
        path: Any = torch_path
        if gpu is not None and runs_triton(*(x for x in args if isinstance(x, Tensor))):
            path = pkgutil.resolve_name(gpu)
        return path(*args)

    schema = torch.library.infer_schema(torch_path, mutates_args=mutates_args)
    operator = torch.library.custom_op(name, run, mutates_args=mutates_args, schema=schema)
    if fake is not None:
        operator.register_fake(fake)
    if not mutates_args:
        operator.register_vmap(functools.partial(_one_by_one, operator))

    @functools.wraps(torch_path)
    def call(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
            rule = "torch.jit.trace, and torch.onnx.export(dynamo=False), cannot record it"
            hint = "use torch.export.export, or for ONNX mmvq.onnx.export(quantizer, path)"
            raise RuntimeError(message(name.split("::")[1], rule, hint=hint, tracing=True))
        # A compiled graph holds the formula of an update in place: inductor lets reads slip behind
        # an operator that writes (torch 2.13: a code that was read before the update came out as it
        # was after), and an operator would take each value of a float for a constant.
        formula = mutates_args and torch.compiler.is_dynamo_compiling()
        chosen: Any = operator if through_operator(x) and not formula else torch_path
        result: R = chosen(x, *args, **kwargs)
        return result

    return call


def through_operator(x: Tensor) -> bool:
    """Whether an operation on `x` goes through its operator: on a GPU, in a graph or transform."""
    return x.device.type == "cuda" or torch.compiler.is_compiling() or transformed()


def _one_by_one(
    operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    """The rule for `torch.vmap`: a call for each slice, whose results are stacked.

    Where the codebook is one, a batch of rows, which the operators take at once, is faster.
    """
    slices = (
        [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    outs = [operator(*each) for each in slices]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])
