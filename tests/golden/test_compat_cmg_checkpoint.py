"""The released encoders against their numbers, and released checkpoints into modules.

ATOL: as in test_compat_cmg.py; a value comes from sums of at most 1,024 terms below 200.
"""

from __future__ import annotations

import math
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmvq.compat import cmg

ATOL = 1e-9
HERE = Path(__file__).parent
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Video_Semantic_Encoder": lambda: cmg.CMGVideoPool(16),
    "InternalTemporalRelationModule": lambda: TimeFirst(8, 16),
    "Video_Encoder": lambda: cmg.CMGVideoEncoder(16, (4, 8), 4),
    "Video_Decoder": lambda: cmg.CMGVideoDecoder(16, 8, 4, 16),
    "Semantic_Decoder": lambda: cmg.CMGHead(16, 7),
    "Semantic_Decoder_AVVP": lambda: cmg.CMGHead(16, 7, per_segment=True),
}
WITHOUT_EFFECT = re.compile(r"encoder_layer|affine_video|ave_v_att")
SECTIONS = {
    "AVT": {
        "Encoder_parameters": "AVT Encoder",
        "Decoder_parameters": "AVT Decoder",
        "CPC_parameters": "CPC AVT",
        "Text_ar_lstm_parameters": "Text_ar_lstm",
        "Video_mi_net_parameters": "Video_mi_net",
        "Audio_mi_net_parameters": "Audio_mi_net",
        "Text_mi_net_parameters": "Audio_mi_net",
    },
    "AV": {
        "Encoder_parameters": "AV Encoder",
        "Decoder_parameters": "AV Decoder",
        "CPC_parameters": "CPC AV",
        "Video_mi_net_parameters": "Video_mi_net",
        "Audio_mi_net_parameters": "Audio_mi_net",
    },
    "AT": {"Encoder_parameters": "AT Encoder", "Text_ar_lstm_parameters": "Text_ar_lstm"},
}


class TimeFirst(cmg.CMGTemporalEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(HERE / "official_cmg_encoders.npz", allow_pickle=False) as file:
        return {key.removeprefix("enc/"): torch.from_numpy(file[key]) for key in file.files}


def case(golden: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """Parameters, inputs and outputs of one released module."""
    own = {k.removeprefix(f"{name}/"): x for k, x in golden.items() if k.startswith(f"{name}/")}
    params = {k.removeprefix("param/"): x for k, x in own.items() if k.startswith("param/")}
    return params, *([x for k, x in own.items() if k.startswith(kind)] for kind in ("in", "out"))


def same(actual: Any, expected: list[Tensor]) -> None:
    actual = actual if isinstance(actual, tuple) else (actual,)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_the_released_numbers(golden: dict[str, Tensor], name: str) -> None:
    params, inputs, outputs = case(golden, name)
    module = MODULES[name]().double().eval()
    module.load_state_dict({k: x for k, x in params.items() if not WITHOUT_EFFECT.search(k)})
    same(module(*inputs), outputs)


def test_audio_encoder_and_decoder_compute_the_released_numbers(golden: dict[str, Tensor]) -> None:
    widths = {"audio": 8, "video": 16}
    encoder = cmg.CMGEncoder(widths, 16, 24, channels=(4, 8), hidden_dim=4).double().eval()
    params, inputs, outputs = case(golden, "Audio_Encoder")
    encoder.get_submodule("Audio_encoder").load_state_dict(params)
    same(encoder.specific("audio", *inputs), outputs)
    decoder = cmg.CMGDecoder(widths, 16, wide=8, hidden_dim=4).double().eval()
    params, inputs, outputs = case(golden, "Audio_Decoder")
    decoder.get_submodule("Audio_decoder").load_state_dict(params)
    same(decoder("audio", *inputs), outputs)


def released_file(path: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A checkpoint with all the keys and shapes of a release.

    Of a large tensor one random row is repeated, which keeps the file small.
    """
    text = (HERE / "official_checkpoint_keys.txt").read_text()
    content: dict[str, Any] = {"optimizer": {"state": {}}, "epoch": 5, "total_step": 900}
    for part, section in SECTIONS[kind].items():
        (body,) = re.findall(rf"^## {re.escape(section)}:.*\n((?:   .*\n?)*)", text, re.MULTILINE)
        content[part] = {}
        for key, numbers in re.findall(r"(\S+) \(([\d, ]*)\)", body):
            shape = [int(n) for n in re.findall(r"\d+", numbers)]
            rows = shape[0] if math.prod(shape) < 200_000 else 1
            values = 0.05 * torch.randn(rows, *shape[1:], dtype=torch.float64)
            content[part][key] = values.expand(shape)
    torch.save(content | changes, path)
    return content


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_released_checkpoint_loads(tmp_path: Path, kind: str) -> None:
    content = released_file(tmp_path / "DCID-model-5.pt", kind)
    loaded = cmg.load_checkpoint(tmp_path / "DCID-model-5.pt")
    parts = {
        "Encoder_parameters": loaded.encoder,
        "Decoder_parameters": loaded.decoder,
        "CPC_parameters": loaded.cpc,
        "Text_ar_lstm_parameters": loaded.text_lstm,
        **{f"{name.title()}_mi_net_parameters": net for name, net in loaded.club.items()},
    }
    assert {part for part, module in parts.items() if module is not None} == set(SECTIONS[kind])
    everything = {f"{p}.{key}" for p in SECTIONS[kind] for key in content[p]}
    taken = set()
    for part, module in parts.items():
        for key, x in module.state_dict().items() if module is not None else ():
            assert torch.equal(x, content[part][key])
            taken.add(f"{part}.{key}")
    assert taken.isdisjoint(loaded.skipped)
    assert taken | set(loaded.skipped) == everything | {"optimizer", "total_step"}
    assert loaded.epoch == 5
    assert not loaded.encoder.training


def test_a_loaded_model_quantizes_and_decodes(tmp_path: Path) -> None:
    released_file(tmp_path / "model.pt", "AVT")
    model = cmg.load_checkpoint(tmp_path / "model.pt")
    assert model.text_lstm is not None
    assert model.decoder is not None
    words, _ = model.text_lstm(torch.randn(1, 2, 768, dtype=torch.float64))
    x = {
        "audio": torch.randn(1, 2, 128, dtype=torch.float64),
        "video": torch.randn(1, 2, 7, 7, 512, dtype=torch.float64),
        "text": words,
    }
    for name, features in x.items():
        codes = model.encoder.infer(name, features)
        difference = codes[..., None, :] - model.encoder.quantizer.embedding  # [B, T, L, D]
        assert bool((difference.abs().amax(-1).amin(-1) < 1e-12).all())
        specific = model.encoder.specific(name, features)
        specific = specific[0] if isinstance(specific, tuple) else specific
        assert model.decoder(name, specific, codes).shape == features.shape


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"Encoder_parameters": Payload()}, "model.pt")
    with pytest.raises(ValueError, match="tensors and plain containers"):
        cmg.load_checkpoint("model.pt")
    assert not Path("ran").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 5_000])
def test_a_torn_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.pt"
    released_file(path, "AT")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="must be a whole checkpoint"):
        cmg.load_checkpoint(path)


def test_no_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cmg.load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("key", ["Text_encoder.text_linear.weight", "a.new"])
def test_another_parameter_is_named(tmp_path: Path, key: str) -> None:
    content = released_file(tmp_path / "model.pt", "AT")["Encoder_parameters"]
    changed = {**content, key: torch.zeros(3, 5)}
    released_file(tmp_path / "model.pt", "AT", Encoder_parameters=changed)
    with pytest.raises(ValueError, match=re.escape(f"first: '{key}'")):
        cmg.load_checkpoint(tmp_path / "model.pt")


WEIGHT = "Audio_encoder.audio_linear.weight"
ODD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "epoch must be an int": lambda parts: {"epoch": "five"},
    "must have Encoder_parameters": lambda parts: {"Encoder_parameters": 5},
    "Encoder_parameters must map names": lambda parts: {
        "Encoder_parameters": {**parts["Encoder_parameters"], 0: torch.ones(1)}
    },
    "must hold plain floating": lambda parts: {
        "Encoder_parameters": {
            **parts["Encoder_parameters"],
            WEIGHT: parts["Encoder_parameters"][WEIGHT].to_sparse(),
        }
    },
    "Encoder_parameters must hold plain": lambda parts: {
        "Encoder_parameters": {k: x.long() for k, x in parts["Encoder_parameters"].items()}
    },
    "CPC_parameters must map": lambda parts: {"CPC_parameters": None},
}


@pytest.mark.parametrize(("message", "change"), ODD.items(), ids=ODD)
def test_odd_content_is_named(
    tmp_path: Path, message: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    path = tmp_path / "model.pt"
    released_file(path, "AT", **change(released_file(path, "AT")))
    with pytest.raises(ValueError, match=message):
        cmg.load_checkpoint(path)


def test_a_damaged_file_raises_one_error(tmp_path: Path) -> None:
    """Its pickle is damaged, and the checksum of the zip made right again."""
    released_file(tmp_path / "whole.pt", "AT")
    draw, refused = random.Random(0), 0
    with zipfile.ZipFile(tmp_path / "whole.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    for _ in range(60):
        content = bytearray(members[name])
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
            for each, whole in members.items():
                file.writestr(each, bytes(content) if each == name else whole)
        try:
            cmg.load_checkpoint(tmp_path / "model.pt")
        except ValueError:
            refused += 1
    assert refused > 40


def test_a_part_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    released_file(tmp_path / "model.pt", "AT", CPC_parameters={"a": 1})
    with pytest.raises(ValueError, match="CPC_parameters must map names to tensors"):
        cmg.load_checkpoint(tmp_path / "model.pt")
