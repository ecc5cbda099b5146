"""How the state of a codebook survives casts, copies, devices, files and frameworks.

Everything that training reads is state, a setting, or derived from these two:

- **State** is seven buffers, all in `state_dict`: `codes`, `sums` and `counts` are float32, or
  float64 once float64 data came; `ages`, `usage`, `steps` and `initialized` are int64. They keep
  these dtypes at every step, whoever casts, copies, averages, loads or moves the module. None is
  bool, because tools that average weights subtract buffers.
- **Settings** (decay, eps, reset_after, ...) are arguments of `__init__` and stand in config.json,
  never in `state_dict`: `mmvq/settings.py`.
- What is **derived** is in no buffer, so no tool can lose or forget it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq.checks import message
from mmvq_kernels.backends import transformed

FLOATS = ("codes", "sums", "counts")

Buffers = dict[str, Tensor | None]
Memory = dict[str, tuple[Tensor, Tensor]]  # name -> buffer, and an alias of its memory


def mend(buffers: Buffers, memory: Memory) -> None:
    """Undo changes to the buffers that the module was not told of.

    FSDP casts a buffer by assigning its `.data`. An alias of the memory from before the cast still
    holds every bit. If the narrow buffer was written to since, its values count instead. A buffer
    made in inference mode cannot be written to outside of it, and is replaced by a copy.

    Raises:
        RuntimeError: inside a graph of `torch.compile(fullgraph=True)`, which cannot do that.
    """
    codes = buffers["codes"]
    assert codes is not None
    if torch.compiler.is_compiling() or transformed():
        if codes.dtype.itemsize < 4:
            rule = "a framework has cast the codebook, which no graph or transform can undo"
            hint = "leave out fullgraph=True, or call the module once outside of it"
            raise RuntimeError(message("EMACodebook", rule, hint=hint, codes=codes))
        return
    for name in FLOATS:
        x = buffers[name]
        if x is None or type(x) is not Tensor or x.is_meta:
            continue
        buffer, before = memory.get(name, (None, x))
        before = before.to(x.device) if buffer is x else x
        if x.dtype.itemsize < max(4, before.dtype.itemsize):
            bits = (y.contiguous().view(torch.uint8) for y in (before.to(x.dtype), x))
            wide = torch.promote_types(before.dtype, torch.float32)
            x.data = before if before is not x and torch.equal(*bits) else x.to(wide)
        if buffer is not x or before.data_ptr() != x.data_ptr():
            memory[name] = x, x.detach()
    for name, y in buffers.items():
        if y is not None and y.is_inference() and not torch.is_inference_mode_enabled():
            buffers[name] = y.clone()


def keep_kind(x: Tensor, moved: Tensor) -> Tensor:
    """`moved`, what a move or cast made of buffer `x`, unless its dtype does not fit the state.

    Floating point buffers follow a cast to another float dtype of at least 32 bits, no others.
    """
    if x.is_floating_point():
        fits = moved.is_floating_point() and moved.dtype.itemsize >= 4
    else:
        fits = moved.dtype == x.dtype
    return moved if fits else x.to(moved.device)


def adopt(buffers: Buffers) -> None:
    """Give the tensors that `load_state_dict(assign=True)` took from a file the state's dtypes."""
    codes = buffers["codes"]
    assert codes is not None
    wide = torch.promote_types(codes.dtype, torch.float32)
    for name, x in buffers.items():
        assert x is not None
        buffers[name] = x.to(wide if name in FLOATS else torch.long)
    initialized = buffers["initialized"]
    assert initialized is not None
    buffers["initialized"] = initialized.clone()
