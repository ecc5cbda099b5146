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

from mmvq_kernels.backends import refuse_tracing, runs_triton, transformed

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
        The operation, without any check of its arguments. In eager mode on a CPU it calls
        `torch_path` directly, because the first call of an operator imports torch's compiler, which
        is slow. Otherwise it calls the operator.
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
        refuse_tracing(name.split("::")[1])
        # torch.compile traces an update in place as plain torch code. With an operator that writes,
        # inductor (torch 2.13) moved earlier reads of the codes behind the update, and dynamo
        # compiled anew for each value of a float.
        inline = mutates_args and torch.compiler.is_dynamo_compiling()
        chosen: Any = operator if through_operator(x) and not inline else torch_path
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

    If all slices share one codebook, one call with all rows is faster.
    """
    slices = (
        [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    outs = [operator(*each) for each in slices]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])
