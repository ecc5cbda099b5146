"""The quantizer and its codebook."""

from __future__ import annotations

from typing import Any

import torch
from cases.form import both, codes, of_each, quantizer, refused, whole, z

import mmvq


def book(**options: Any) -> mmvq.EMACodebook:
    return mmvq.EMACodebook(4, 8, **options)


def cast_in_a_transform() -> object:
    cast = book()
    cast.codes.data = cast.codes.bfloat16()
    return torch.vmap(cast.search)(z)


CODEBOOK = [
    *(
        refused(
            ValueError,
            f"{where}: x must be [..., 4], on the device of the codebook",
            *of_each(call, z[..., :3], z.sum(), z.to("meta")),
        )
        for where, call in (
            ("MultiModalEMAQuantizer.encode", lambda x: quantizer().encode(x)),
            ("EMACodebook.search", lambda x: book().search(x)),
        )
    ),
    refused(
        TypeError,
        "MultiModalEMAQuantizer.encode: x must be a floating point tensor",
        lambda: quantizer().encode({"audio": z}),
    ),
    refused(
        TypeError,
        "EMACodebook.accumulate: values must be a floating point tensor",
        lambda: book().accumulate(z.long(), torch.zeros(2, 5, dtype=torch.long)),
    ),
    refused(
        ValueError,
        "EMACodebook.accumulate: values must be [..., 4], indices and groups [...]",
        lambda: book().accumulate(z, torch.zeros(10, dtype=torch.long)),
    ),
    refused(
        ValueError,
        "EMACodebook.initialize: values must be [..., 8], groups and usable [...]",
        lambda: mmvq.EMACodebook(8, 4, init="kmeans").initialize(z),
    ),
    refused(
        TypeError,
        "MultiModalEMAQuantizer.decode: indices must be an integer tensor",
        *of_each(lambda x: quantizer().decode(x), z, whole, {"audio": whole}, [0, 1]),
    ),
    refused(
        TypeError,
        "EMACodebook.accumulate: indices must be an int64 tensor",
        *of_each(lambda x: book().accumulate(z, x), whole.int(), {"audio": whole}, [0, 1]),
    ),
    refused(
        TypeError,
        "EMACodebook.set_codes: codes must be a floating point tensor",
        lambda: book().set_codes(codes.long()),
    ),
    refused(
        ValueError,
        "EMACodebook.set_codes: codes must be [8, 4], and counts [8] or None",
        *(
            lambda make=make, given=given: make().set_codes(*given)
            for make in (quantizer, book)
            for given in (
                (torch.zeros(7, 4),),
                (torch.tensor(0.0),),
                (codes, torch.ones(8, 1)),
                (codes, 1.0),
            )
        ),
    ),
    refused(
        ValueError,
        "EMACodebook.set_codes: codes must be finite and below 1e15, and counts finite and not "
        "below 0",
        *of_each(
            lambda given: book().set_codes(*given),
            (torch.full((8, 4), torch.nan),),
            (codes, torch.full((8,), -1.0)),
            (codes, torch.full((8,), torch.inf)),
            (codes + 1e16,),
            (codes + 1e10, torch.full((8,), 1e36)),
        ),
    ),
    refused(
        RuntimeError,
        "EMACodebook: a framework has cast the codebook, which no graph or transform can undo",
        cast_in_a_transform,
    ),
    refused(
        RuntimeError,
        'MultiModalEMAQuantizer: update="manual" cannot work in a replica of DataParallel',
        lambda: quantizer(update="manual")._replicate_for_data_parallel()(both),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer.extended: codebook_size must be an int of at least 8",
        lambda: quantizer().extended(codebook_size=7),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer.extended: modalities must hold the old ones too",
        lambda: quantizer().extended(modalities=("audio", "text")),
    ),
    refused(
        IndexError,
        "MultiModalEMAQuantizer.decode: indices must be below 8",
        lambda: quantizer().decode(torch.tensor([0, 8])),
    ),
    refused(
        IndexError,
        "EMACodebook.accumulate: indices must be below 8",
        lambda: book().accumulate(codes, torch.arange(1, 9)),
    ),
    refused(
        IndexError,
        "EMACodebook.accumulate: groups must be below 1",
        lambda: book().accumulate(codes, torch.arange(8), torch.ones(8, dtype=torch.long)),
    ),
    refused(
        IndexError,
        "EMACodebook.initialize: groups must be 0 or more",
        lambda: book(init="kmeans").initialize(codes, torch.full((8,), -1)),
    ),
    refused(
        IndexError,
        "EMACodebook.accumulate: groups must be 0 or more",
        lambda: book().accumulate(codes, torch.arange(8), torch.full((8,), -1)),
    ),
    refused(
        ValueError,
        "EMACodebook.initialize: usable must be a bool tensor shaped as its features without D, "
        "on their device",
        lambda: book(init="kmeans").initialize(z, usable=whole.float()),
    ),
    refused(
        TypeError,
        "update_codebooks: modules must be an nn.Module, or several",
        lambda: mmvq.update_codebooks({"a": quantizer()}),  # type: ignore[arg-type]
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer: the partner callable must return a tensor shaped as z_a",
        *of_each(lambda r: quantizer(partner=lambda z_a, others, masks: r)(both), z[:1], None),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer: the commitment must return a floating point scalar",
        *of_each(
            lambda loss: quantizer(commitment=lambda z, codes, masks: loss)(both),
            *(z, z.sum().long(), 0.5),
        ),
    ),
]
