"""Registration of an operation as a torch custom operator, in one call.

A compiled or exported graph then holds the operator, which chooses between the Triton kernels and
the torch path when it runs.
"""

from __future__ import annotations

import functools
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmvq_kernels.backends import refuse_tracing, runs_triton, transformed

P = ParamSpec("P")
R = TypeVar("R")

MOST_GROUPS = 62
"""Groups that a kernel can tell apart, by bits of an int64."""

GPU_PATHS: dict[str, str] = {}
"""Name of each operator with Triton kernels -> `module:name` of the function that launches them."""


def register(
    name: str,
    torch_path: Callable[Concatenate[Tensor, P], R],
    *,
    gpu: str | None = None,
    fake: Callable[..., object] | None = None,
    mutates_args: Sequence[str] = (),
    inline: bool = False,
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
        inline: whether transforms, and graphs for a CPU, hold the torch calls of `torch_path`;
            always so for an operator that writes. Behind such an operator inductor
            (torch 2.13) moved earlier reads of the codes. As dynamo would compile a graph for each
            value of a float, a graph holds a second operator, `<name>_of_tensors`, which takes them
            as tensors of no dimension.

    Returns:
        The operation, without any check of its arguments. In eager mode on a CPU it calls
        `torch_path` directly, because the first call of an operator imports torch's compiler, which
        is slow. Otherwise it calls the operator.
    """
    inline = inline or bool(mutates_args)

    def run(*args: Any) -> Any:
        path: Any = torch_path
        if gpu is not None and runs_triton(*(x for x in args if isinstance(x, Tensor) and x.ndim)):
            path = pkgutil.resolve_name(gpu)
        return path(*args)

    if gpu is not None:
        GPU_PATHS[name] = gpu
    schema = torch.library.infer_schema(torch_path, mutates_args=mutates_args)
    schemas = {name: schema}
    if inline and "float" in schema:
        schemas[f"{name.removesuffix('_')}_of_tensors"] = re.sub(r"\bfloat\b", "Tensor", schema)
    operators: list[Any] = [
        torch.library.custom_op(each, run, mutates_args=mutates_args, schema=text)
        for each, text in schemas.items()
    ]
    for operator in operators:
        if fake is not None:
            operator.register_fake(fake)
        if not mutates_args:
            operator.register_vmap(functools.partial(_one_by_one, operator))
    arguments = operators[0]._opoverload._schema.arguments
    floats = [i for i, x in enumerate(arguments) if "float" in str(x.type)]

    @functools.wraps(torch_path)
    def call(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        refuse_tracing(name.split("::")[1])
        chosen: Any = torch_path
        given: list[Any] = [x, *args]
        if through_operator(x, inline):
            chosen = operators[0]
            if torch.compiler.is_compiling() and len(operators) > 1:
                chosen = operators[1]
                for i in floats:
                    given[i] = None if given[i] is None else variable(x, given[i])
        result: R = chosen(*given, **kwargs)
        return result

    return call


def variable(like: Tensor, number: float) -> Tensor:
    """A number that is no constant of a graph, as a tensor of no dimension on a device."""
    return like.new_ones((), dtype=torch.promote_types(like.dtype, torch.float32)) * number


def fused(*tensors: Tensor | None) -> bool:
    """Whether kernels that fuse many torch calls take these tensors, outside of transforms."""
    level: int = forward_ad._current_level
    return runs_triton(*tensors) and not transformed() and level < 0


def through_operator(x: Tensor, inline: bool = False) -> bool:
    """Whether an operation on `x` goes through its operator: on a GPU, in a graph or transform."""
    if inline:
        return x.device.type == "cuda" and not transformed()
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
