"""Codebooks of other libraries, loaded from files, models and states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import close, rounding, uniform
from torch import Tensor, nn

from mmvq import MultiModalEMAQuantizer, functional
from mmvq.compat import cmg, vector_quantize_pytorch

L, D = 12, 5
Entries = dict[str, Any]


def released() -> cmg.CMGQuantizer:
    """A quantizer trained in float64, as the release is, with a reset code: e is not o / N."""
    module = cmg.CMGQuantizer(D, L, ("audio", "video")).double()
    for seed in range(20):
        module(
            {
                name: uniform(4, 6, D, seed=seed + 50 * i)
                for i, name in enumerate(("audio", "video"))
            }
        )
    module.embedding[3] = 0.5
    return module


class EnCodecLike(nn.Module):
    """The buffers of EnCodec's EuclideanCodebook, under the names in its models."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for seed, layer in enumerate(self.layers):
            counts = 5 * uniform(L, dtype=torch.float32, seed=seed).abs()
            embed = uniform(L, D, dtype=torch.float32, seed=seed + 9)
            smoothed = functional.laplace_smoothing(counts, 1e-5)[:, None]
            book = nn.Module()
            book.register_buffer("inited", torch.ones(1))
            book.register_buffer("cluster_size", counts)
            book.register_buffer("embed", embed)
            book.register_buffer("embed_avg", embed * smoothed)
            book.decay, book.epsilon = 0.95, 1e-4
            layer.add_module("_codebook", book)


def saved(entries: Entries, path: Path) -> Path:
    torch.save(entries, path)
    return path


def prefixed(entries: Entries, prefix: str) -> Entries:
    return {f"{prefix}{name}": x for name, x in entries.items()}


RELEASED: dict[str, Callable[[cmg.CMGQuantizer, Path], Any]] = {
    "module": lambda module, folder: module,
    "a model that holds it": lambda module, folder: nn.ModuleDict({"inner": module}),
    "its state": lambda module, folder: module.state_dict(),
    "that of the encoder": lambda module, folder: prefixed(module.state_dict(), "Cross_quantizer."),
    "the content of a file": lambda module, folder: {
        "Encoder_parameters": prefixed(module.state_dict(), "Cross_quantizer."),
        "optimizers": {"state": {}},
        "epoch": 5,
    },
    "a file": lambda module, folder: saved(
        {"Encoder_parameters": prefixed(module.state_dict(), "Cross_quantizer."), "epoch": 5},
        folder / "DCID-model-5.pt",
    ),
    "a path as text": lambda module, folder: str(saved(module.state_dict(), folder / "book.pt")),
}


@pytest.mark.parametrize("source", RELEASED.values(), ids=RELEASED)
def test_a_released_codebook_of_any_size(source: Callable[..., Any], tmp_path: Path) -> None:
    theirs = released()
    ours = cmg.load(source(theirs, tmp_path), decay=0.9)
    book = ours.ema_codebook
    assert torch.equal(ours.codebook, theirs.embedding)
    assert torch.equal(book.counts, 2 * theirs.ema_count)  # of the two modalities together
    smoothed = functional.laplace_smoothing(book.counts, book.eps)[:, None]
    close(book.sums, theirs.embedding * smoothed, rounding(torch.float64, 4, 50))
    assert (ours.modalities, ours.decay) == (("audio", "video"), 0.9)
    one = cmg.load(theirs, update_from=("audio",))
    assert torch.equal(one.ema_codebook.counts, theirs.ema_count)
    x = uniform(7, D, seed=1)
    straight_through = theirs.eval().infer(x)  # z + (e - z)
    close(ours.decode(ours.encode(x)), straight_through, rounding(torch.float64, 2, 2))
    ours({"audio": x[:, None]})  # training continues: no code is initialised again
    moved = (ours.codebook != theirs.embedding).any(1)
    assert torch.equal(moved, ours.usage().counts["audio"] > 0)


def test_training_continues_as_in_the_release() -> None:
    """The first step moves the codes as far as in the release: N has the same weight.

    With decay 0.9^M and the aligned partner, on features that all modalities share. The order of
    the steps within a batch differs, and the smoothing: at most 5% of the distance.
    """
    names = ("audio", "video", "text")
    theirs = cmg.CMGQuantizer(D, L, names, decay=0.9).double()
    for seed in range(60):
        x = uniform(8, 6, D, seed=seed)
        theirs(dict.fromkeys(names, x))
    ours = cmg.load(theirs, decay=0.9**3, partner="aligned", reset_after=None)
    before, x = ours.codebook, 0.5 + uniform(8, 6, D, seed=100)
    theirs(dict.fromkeys(names, x))
    ours(dict.fromkeys(names, x))
    distance = (theirs.embedding - before).norm()
    assert (ours.codebook - theirs.embedding).norm() < 0.05 * distance


def test_modalities_are_those_with_an_encoder_in_the_source() -> None:
    state = prefixed(released().state_dict(), "Cross_quantizer.")
    encoders = {f"{m}_self_att.affine_matrix.weight": torch.ones(1) for m in ("text", "audio")}
    assert cmg.load({**state, **encoders}).modalities == ("audio", "text")
    assert cmg.load({**state, **encoders}, ("audio", "depth")).modalities == ("audio", "depth")
    three = cmg.CMGQuantizer(D, L, ("a", "b", "c"))
    assert cmg.load(three).modalities == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["module", "state", "codebook's state", "file"])
def test_a_codebook_of_encodec(kind: str, tmp_path: Path) -> None:
    model = EnCodecLike()
    book = model.layers[0].get_submodule("_codebook")
    sources = {
        "module": lambda: model,
        "state": model.state_dict,
        "codebook's state": book.state_dict,
        "file": lambda: saved(model.state_dict(), tmp_path / "encodec.pt"),
    }
    ours = vector_quantize_pytorch.load(sources[kind](), ("audio",), partner="none")
    assert torch.equal(ours.codebook, book.embed)
    assert torch.equal(ours.ema_codebook.counts, book.cluster_size)
    assert torch.equal(ours.ema_codebook.sums, book.embed_avg)
    assert ours.ema_codebook.initialized
    if kind == "module":
        assert (ours.decay, ours.eps) == (0.95, 1e-4)


def test_one_of_several_codebooks_is_selected_by_its_prefix() -> None:
    state = EnCodecLike(layers=3).state_dict()
    prefix = "layers.1._codebook."
    one = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    ours = vector_quantize_pytorch.load(one)
    assert torch.equal(ours.codebook, state[f"{prefix}embed"])


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = EnCodecLike().state_dict()
    save_file(state, tmp_path / "book.safetensors")
    ours: MultiModalEMAQuantizer = vector_quantize_pytorch.load(tmp_path / "book.safetensors")
    assert torch.equal(ours.codebook, state["layers.0._codebook.embed"])
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    assert torch.equal(vector_quantize_pytorch.load(tmp_path / "folder").codebook, ours.codebook)
    (tmp_path / "book.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="the file must be a whole checkpoint"):
        vector_quantize_pytorch.load(tmp_path / "book.safetensors")


def test_a_missing_file(tmp_path: Path) -> None:
    for load in (cmg.load, vector_quantize_pytorch.load):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nothing.pt")


def test_codes_that_are_not_finite_are_refused() -> None:
    state: dict[str, Tensor] = dict(released().state_dict())
    state["embedding"] = state["embedding"].clone().index_fill_(0, torch.tensor(2), torch.nan)
    with pytest.raises(ValueError, match="codes must be finite"):
        cmg.load(state)
