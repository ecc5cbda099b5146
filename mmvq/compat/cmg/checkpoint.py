"""Loads released checkpoints, `DCID-model-{epoch}.pt`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from mmvq.checks import message
from mmvq.compat.cmg.club import CMGCLUB
from mmvq.compat.cmg.cpc import CMGCrossCPC
from mmvq.compat.cmg.encoders import CMGDecoder, CMGEncoder
from mmvq.compat.reading import Source, find_codebook, is_floating, read_file
from mmvq.quantizer import MultiModalEMAQuantizer

_WIDTHS = {"audio": 128, "video": 512, "text": 256}  # of the features, in the release's order
_SPECIFIC_WIDTHS = {"audio": 256, "video": 512, "text": 256}  # of the input of CLUB
_CODE_DIM = 256
_HINT = "pass a DCID-model-{epoch}.pt of the release, untouched"
_UNUSED = re.compile(  # parameters that reach no output
    r"\w+_self_att\.encoder_layer\.|\w+_semantic_decoder\."
    r"|video_semantic_encoder\.(affine_video_ave|affine_video_self|ave_v_att)\."
)


class CMGCheckpoint(NamedTuple):
    """A released model, in eval mode. Parts that the file does not have are None.

    Attributes:
        encoder: Phi, Psi and the codebook.
        decoder: decoders.
        cpc: Cross-CPC.
        club: modality -> its CLUB estimator.
        text_lstm: LSTM that maps BERT's features `[B, T, 768]` to `[B, T, 256]`.
        epoch: last epoch of training.
        skipped: entries of the file that were not loaded, "part.key" or "part".
    """

    encoder: CMGEncoder
    decoder: CMGDecoder | None
    cpc: CMGCrossCPC | None
    club: dict[str, CMGCLUB]
    text_lstm: nn.LSTM | None
    epoch: int | None
    skipped: tuple[str, ...]


def load_checkpoint(path: str | PathLike[str]) -> CMGCheckpoint:
    """Load a released checkpoint of two or three modalities, without unpickling objects.

    The modules take the tensors of the file, in its dtype float64. The codes are the release's
    `embedding`, which differs from `ema_weight / ema_count` after a reset. Parameters that affect
    no output are skipped: the layer from which the temporal encoder was copied, the attention over
    cells (a softmax over one element) and the decoders' classifiers. Optimizers and counters are
    skipped too.

    Args:
        path: path of the `.pt` file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has objects other than tensors and plain containers, or its
            parameters are not the released ones.
    """
    content = read_file("load_checkpoint", path, _HINT)
    released = content.get("Encoder_parameters")
    released = released if isinstance(released, Mapping) else {}
    names = [name for name in _WIDTHS if f"{name}_self_att.affine_matrix.weight" in released]
    if len(names) < 2:
        rule = "the file must have Encoder_parameters of two or three modalities"
        _refuse(path, rule, found=sorted(map(str, content)))
    epoch = content.get("epoch")
    if not (epoch is None or type(epoch) is int):
        _refuse(path, "epoch must be an int", found=epoch)
    widths = {name: _WIDTHS[name] for name in names}
    with torch.device("meta"):  # shapes alone; the tensors of the file replace them
        encoder, decoder = CMGEncoder(widths), CMGDecoder(widths)
        cpc = CMGCrossCPC(_CODE_DIM, names)
        text_lstm = nn.LSTM(768, _CODE_DIM // 2, 2, batch_first=True, bidirectional=True)
        club = {name: CMGCLUB(_CODE_DIM, _SPECIFIC_WIDTHS[name]) for name in names}
    modules: dict[str, nn.Module] = {
        "Encoder_parameters": encoder,
        "Decoder_parameters": decoder,
        "CPC_parameters": cpc,
        "Text_ar_lstm_parameters": text_lstm,
        **{f"{name.title()}_mi_net_parameters": net for name, net in club.items()},
    }
    skipped = sorted(str(name) for name in content if name not in (*modules, "epoch"))
    for part, module in modules.items():
        if part in content:
            skipped += _fill(path, part, module, content[part])
    return CMGCheckpoint(
        encoder=encoder,
        decoder=decoder if "Decoder_parameters" in content else None,
        cpc=cpc if "CPC_parameters" in content else None,
        club={n: net for n, net in club.items() if f"{n.title()}_mi_net_parameters" in content},
        text_lstm=text_lstm if "Text_ar_lstm_parameters" in content else None,
        epoch=epoch,
        skipped=tuple(skipped),
    )


def load(
    source: Source, modalities: Sequence[str] | None = None, **settings: Any
) -> MultiModalEMAQuantizer:
    """Build a native quantizer with a released codebook of any width and size, to train further.

    Its codes are the release's `embedding`. Its N is `ema_count` times the number of modalities
    that update the codebook: the release takes one step per modality, so that its count is the mean
    over the modalities, where mmvq's is the sum. The release keeps o when it resets a code; here o
    is computed from e and N. Ages and usage start at their initial values. All settings have mmvq's
    defaults unless given; the migration guide lists the settings nearest to the release.

    Args:
        source: a `DCID-model-{epoch}.pt`, its content or a part of it, a `CMGQuantizer`, or a model
            or `state_dict` with one such codebook under any prefix: `embedding` `[L, D]` and
            `ema_count` `[L]`.
        modalities: names of the quantizer's modalities. None: those that have an encoder in the
            source, or audio and video if none has.
        **settings: all other arguments of `MultiModalEMAQuantizer`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `source` has no such codebook, or several; or the codebook is damaged.

    Examples:
        >>> from mmvq.compat import cmg
        >>> cmg.load(cmg.CMGQuantizer(16, 32)).codebook.shape
        torch.Size([32, 16])
    """
    where, hint = "cmg.load", "pass a released checkpoint, a CMGQuantizer, or a state_dict of one"
    prefix, state = find_codebook(where, source, "ema_count", hint)
    codes, counts = state.get(f"{prefix}embedding"), state.get(f"{prefix}ema_count")
    if codes is None or counts is None or codes.ndim != 2 or not is_floating(codes, counts):
        rule = "the source must hold embedding [L, D] and ema_count [L]"
        raise ValueError(message(where, rule, hint=hint, embedding=codes, ema_count=counts))
    encoded = [m for m in _WIDTHS if any(f"{m}_self_att." in name for name in state)]
    names: Any = modalities or encoded or getattr(source, "modalities", ("audio", "video"))
    size, dim = codes.shape
    quantizer = MultiModalEMAQuantizer(dim, size, names, **settings)
    quantizer.set_codes(codes, counts * len(quantizer.update_from or quantizer.modalities))
    return quantizer


def _fill(path: str | PathLike[str], part: str, module: nn.Module, state: Any) -> list[str]:
    """Load a part of the file into a module, and return the names of the skipped tensors."""
    entries = dict(state) if isinstance(state, Mapping) else {None: None}
    if not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in entries.items()):
        _refuse(path, f"{part} must map names to tensors", found=type(state))
    for key, x in state.items():
        if not is_floating(x) or x.layout != torch.strided or x.is_meta:
            _refuse(path, f"{part} must hold plain floating point tensors", name=key, found=x)
    taken = {key: x for key, x in state.items() if not _UNUSED.match(key)}
    found = {key: tuple(x.shape) for key, x in taken.items()}
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    odd = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if odd:
        _refuse(
            path,
            f"{part} must hold the released parameters; {len(odd)} of them do not fit",
            first=odd[0],
            expected=expected.get(odd[0]),
            found=found.get(odd[0]),
        )
    module.load_state_dict(taken, assign=True)
    module.eval()
    return [f"{part}.{key}" for key in state if key not in taken]


def _refuse(path: str | PathLike[str], rule: str, **got: object) -> NoReturn:
    raise ValueError(message("load_checkpoint", rule, hint=_HINT, path=str(path), **got))
