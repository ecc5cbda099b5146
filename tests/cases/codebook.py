"""The quantizer and its codebook."""

from __future__ import annotations

import torch
from cases.form import Case, both, codes, finite, nan, quantizer, whole, z

import mmvq


def cast_in_a_transform() -> object:
    book = mmvq.EMACodebook(4, 8)
    book.codes.data = book.codes.bfloat16()
    return torch.vmap(book.search)(z)


CODEBOOK = [
    *(
        Case(
            lambda call=call, x=x: call(x),
            ValueError,
            f"{where}: x must be [..., 4], on the device of the codebook",
            f"x: {came}   codebook: float32[8, 4]",
            "project its last dimension to 4; move it with .to(device)",
        )
        for where, call in (
            ("MultiModalEMAQuantizer.encode", lambda x: quantizer().encode(x)),
            ("EMACodebook.search", lambda x: mmvq.EMACodebook(4, 8).search(x)),
        )
        for x, came in (
            (z[..., :3], "float32[2, 5, 3]"),
            (z.sum(), "float32[]"),
            (z.to("meta"), "float32[2, 5, 4] on meta"),
        )
    ),
    Case(
        lambda: quantizer().encode({"audio": z}),
        TypeError,
        "MultiModalEMAQuantizer.encode: x must be a floating point tensor",
        "x: {'audio': float32[2, 5, 4]}",
        "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
    ),
    Case(
        lambda: mmvq.EMACodebook(4, 8).accumulate(z.long(), torch.zeros(2, 5, dtype=torch.long)),
        TypeError,
        "EMACodebook.accumulate: values must be a floating point tensor",
        "values: int64[2, 5, 4]",
        "convert it with .float()",
    ),
    Case(
        lambda: mmvq.EMACodebook(4, 8).accumulate(z, torch.zeros(10, dtype=torch.long)),
        ValueError,
        "EMACodebook.accumulate: values must be [..., 4], indices and groups [...]",
        "values: float32[2, 5, 4]   indices: int64[10]   groups: int64[10]",
        "pass the indices that search(x) returned",
    ),
    Case(
        lambda: mmvq.EMACodebook(8, 4, init="kmeans").initialize(z),
        ValueError,
        "EMACodebook.initialize: values must be [..., 8], groups and usable [...]",
        "values: float32[2, 5, 4]   groups: int64[2, 5]   usable: bool[2, 5]",
        "give each vector one group, and one True or False",
    ),
    *(
        Case(
            lambda given=given: quantizer().decode(given),
            TypeError,
            "MultiModalEMAQuantizer.decode: indices must be an integer tensor",
            f"indices: {came}",
            "pass what encode returned, of one modality",
        )
        for given, came in (
            (torch.zeros(2, 5), "float32[2, 5]"),
            (whole, "bool[2, 5]"),
            ({"audio": whole}, "{'audio': bool[2, 5]}"),
            ([0, 1], "[0, 1]"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.EMACodebook(4, 8).accumulate(z, given),
            TypeError,
            "EMACodebook.accumulate: indices must be an int64 tensor",
            f"indices: {came}",
            "pass the indices that search(x) returned",
        )
        for given, came in (
            (torch.zeros(2, 5, dtype=torch.int32), "int32[2, 5]"),
            ({"audio": whole}, "{'audio': bool[2, 5]}"),
            ([0, 1], "[0, 1]"),
        )
    ),
    *(
        Case(
            lambda call=call, given=given: call().set_codes(*given),
            ValueError,
            "EMACodebook.set_codes: codes must be [8, 4], and counts [8] or None",
            f"codes: {came}",
            "build the module with the size and width of the codes",
        )
        for call in (quantizer, lambda: mmvq.EMACodebook(4, 8))
        for given, came in (
            ((torch.zeros(7, 4),), "float32[7, 4]   counts: None"),
            ((torch.tensor(0.0),), "float32[]   counts: None"),
            ((codes, torch.ones(8, 1)), "float32[8, 4]   counts: float32[8, 1]"),
            ((codes, 1.0), "float32[8, 4]   counts: 1.0"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.EMACodebook(4, 8).set_codes(*given),
            ValueError,
            "EMACodebook.set_codes: codes must be finite and below 1e15, and counts finite and not "
            "below 0",
            "rows_that_are_not: 8",
            "look for a damaged file, or for a division by a count of 0",
        )
        for given in (
            (torch.full((8, 4), torch.nan),),
            (codes, torch.full((8,), -1.0)),
            (codes, torch.full((8,), torch.inf)),
            (codes + 1e16,),
            (codes + 1e10, torch.full((8,), 1e36)),
        )
    ),
    Case(
        cast_in_a_transform,
        RuntimeError,
        "EMACodebook: a framework has cast the codebook, which no graph or transform can undo",
        "codes: bfloat16[8, 4]",
        "leave out fullgraph=True, or call the module once outside of it",
    ),
    Case(
        lambda: quantizer(update="manual")._replicate_for_data_parallel()(both),
        RuntimeError,
        'MultiModalEMAQuantizer: update="manual" cannot work in a replica of DataParallel',
        "update: 'manual'",
        "its statistics are lost with the replica: use DistributedDataParallel",
    ),
    Case(
        lambda: quantizer().extended(codebook_size=7),
        ValueError,
        "MultiModalEMAQuantizer.extended: codebook_size must be an int of at least 8",
        "codebook_size: 7",
        "pass a Python int, 8 or more",
    ),
    Case(
        lambda: quantizer().extended(modalities=("audio", "text")),
        ValueError,
        "MultiModalEMAQuantizer.extended: modalities must hold the old ones too",
        "modalities: ('audio', 'text')   lost: ['video']",
        "pass all names, old and new",
    ),
    *(
        Case(call, IndexError, f"{where}: {name} must be below {size}", f"largest: {size}", hint)
        for where, name, size, hint, call in (
            (
                "MultiModalEMAQuantizer.decode",
                "indices",
                8,
                "pass what encode returned, of one modality",
                lambda: quantizer().decode(torch.tensor([0, 8])),
            ),
            (
                "EMACodebook.accumulate",
                "indices",
                8,
                "pass the indices that search(x) returned",
                lambda: mmvq.EMACodebook(4, 8).accumulate(codes, torch.arange(1, 9)),
            ),
            (
                "EMACodebook.accumulate",
                "groups",
                1,
                "number the groups from 0",
                lambda: mmvq.EMACodebook(4, 8).accumulate(
                    codes, torch.arange(8), torch.ones(8, dtype=torch.long)
                ),
            ),
        )
    ),
    *(
        Case(
            lambda call=call: call(torch.full((8,), -1)),
            IndexError,
            f"EMACodebook.{name}: groups must be 0 or more",
            "least: -1",
            "number the groups from 0",
        )
        for name, call in (
            (
                "initialize",
                lambda groups: mmvq.EMACodebook(4, 8, init="kmeans").initialize(codes, groups),
            ),
            (
                "accumulate",
                lambda groups: mmvq.EMACodebook(4, 8).accumulate(codes, torch.arange(8), groups),
            ),
        )
    ),
    Case(
        lambda: mmvq.EMACodebook(4, 8, init="kmeans").initialize(z, usable=whole.float()),
        ValueError,
        "EMACodebook.initialize: usable must be a bool tensor shaped as its features without D, "
        "on their device",
        "mask: float32[2, 5]   features: float32[2, 5, 4]",
        "pass True where a segment is valid, False where it is padding",
    ),
    Case(
        lambda: mmvq.update_codebooks({"a": quantizer()}),  # type: ignore[arg-type]
        TypeError,
        "update_codebooks: modules must be an nn.Module, or several",
        "modules: ['a']",
        "pass the model that holds the quantizers, or a list of them",
    ),
    *(
        Case(
            lambda r=r: quantizer(partner=lambda z_a, others, masks: r)(both),
            ValueError,
            "MultiModalEMAQuantizer: the partner callable must return a tensor shaped as z_a",
            f"z_a: float32[2, 5, 4]   r: {came}",
            "return [B, T, D], and z_a itself where there is no partner",
        )
        for r, came in ((z[:1], "float32[1, 5, 4]"), (None, "None"))
    ),
    finite("MultiModalEMAQuantizer", lambda: quantizer()({"audio": nan})),
]
