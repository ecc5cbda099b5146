"""Encoders: those that are built in tell things apart, and those of transformers are used right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from small_models import WORDS, save_models
from torch import Tensor

from cmg.digits import speech
from cmg.errors import DataError
from cmg.media.encoders import MODALITIES, default_encoder, load_encoder

SAMPLES = 16_000
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def example(modality: str, encoder: object, n: int = 3) -> object:
    """What an encoder takes, of n clips or segments."""
    generator = torch.Generator().manual_seed(n)
    if modality == "video":
        shape = (n, encoder.frames, encoder.size, encoder.size, 3)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if modality == "audio":
        return 0.1 * torch.randn(n, 2, encoder.rate, generator=generator)
    return ["a dog barks", "two cats", "a"][:n]


def similarity(x: Tensor) -> Tensor:
    """Cosine of every two rows, without their mean."""
    x = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    return x @ x.T


BUILT_IN = [
    ("video", "efficientnet-lite0", 1280),
    ("video", "patches", 1024),
    ("audio", "speech-embedding", 192),
    ("audio", "log-mel", 128),
    ("text", "wordllama", 256),
    ("text", "n-grams", 768),
]


@pytest.mark.parametrize(("modality", "name", "width"), BUILT_IN)
@torch.inference_mode()
def test_built_in(modality: str, name: str, width: int) -> None:
    encoder = load_encoder(modality, name)
    x = example(modality, encoder)
    found = encoder(x)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.shape == ((3, 2, width) if modality == "audio" else (3, width))
    assert encoder.width == width
    assert torch.equal(found, encoder(x))
    assert not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(encoder(x[1:2]), found[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "patches"])
@torch.inference_mode()
def test_two_parts_of_a_picture_are_nearer_than_two_pictures(name: str) -> None:
    encoder = load_encoder("video", name)
    size, crops = encoder.size, []
    for picture in load_sample_images().images:
        crops += [picture[100 : 100 + size, x : x + size] for x in (200, 200 + size // 2)]
    frames = torch.from_numpy(np.stack(crops))[:, None]
    near = similarity(encoder(frames))
    assert near[0, 1] > near[0, 2:].max()
    assert near[2, 3] > near[2, :2].max()


@pytest.mark.parametrize(("name", "least"), [("speech-embedding", 0.6), ("log-mel", 0.25)])
@torch.inference_mode()
def test_digits_by_other_voices_are_recognised(name: str, least: float) -> None:
    encoder = load_encoder("audio", name)
    rng = np.random.default_rng(0)
    digits = np.tile(np.arange(10), 4)
    voices = speech.voices(0, 0)

    def spoken(first: int) -> Tensor:
        rows = digits.reshape(-1, 10)
        sound = [speech.record(x, voices[first + k], rng) for k, x in enumerate(rows)]
        return encoder(torch.from_numpy(np.stack(sound)).float().clamp(-1, 1)).flatten(0, 1)

    train, test = spoken(0), spoken(10)
    scale = train.std(0).clamp(min=1e-3)
    near = torch.cdist(test / scale, train / scale).argmin(1)
    accuracy = (digits[near] == digits).mean()
    assert accuracy > least  # chance is 0.1


@torch.inference_mode()
def test_a_spoken_word_is_in_its_segment() -> None:
    """The embedding of a segment does not move when there is sound in segments far from it."""
    encoder = load_encoder("audio", "speech-embedding")
    sound = torch.zeros(2, 6, SAMPLES)
    word = torch.from_numpy(
        speech.record(np.array([7]), speech.voices(0, 0)[0], np.random.default_rng(0))
    )
    sound[1, 3] = word[0].clamp(-1, 1)
    silent, spoken = encoder(sound)
    difference = (spoken - silent).norm(dim=1)
    assert difference.argmax() == 3
    assert difference[[0, 1, 5]].max() < 1e-3 * difference[3]


@torch.inference_mode()
def test_segments_shorter_than_a_step_of_the_speech_embedding() -> None:
    encoder = load_encoder("audio", "speech-embedding")
    found = encoder(0.1 * torch.randn(1, 7, 500))
    assert found.shape == (1, 7, 192)
    assert found.isfinite().all()


@torch.inference_mode()
def test_words_of_similar_meaning_are_nearer() -> None:
    encoder = load_encoder("text", "wordllama")
    near = similarity(
        encoder(["a dog barks", "the puppy is barking", "interest rates", "the bank"])
    )
    assert near[0, 1] > near[0, 2:].max()
    assert near[2, 3] > near[2, :2].max()


def test_the_default_is_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [default_encoder(m) for m in MODALITIES] == [
        "speech-embedding", "efficientnet-lite0", "wordllama",
    ]  # fmt: skip
    monkeypatch.setattr("cmg.media.encoders.find_spec", lambda name: None)
    assert [default_encoder(m) for m in MODALITIES] == ["log-mel", "patches", "n-grams"]
    with pytest.raises(DataError, match=r"pip install 'mmvq\[media\]'"):
        load_encoder("text", "wordllama")


HUGGING_FACE = [
    ("video", "clip", 12), ("video", "siglip", 16), ("video", "dinov2", 16),
    ("video", "videomae", 16), ("text", "siglip", 16),
    ("audio", "wav2vec2", 16), ("audio", "ast", 16), ("audio", "clap", 12),
    ("audio", "whisper", 16), ("text", "clip", 12), ("text", "clap", 12), ("text", "bert", 16),
]  # fmt: skip


@pytest.mark.parametrize(("modality", "name", "width"), HUGGING_FACE)
@torch.inference_mode()
def test_models_of_transformers(models: Path, modality: str, name: str, width: int) -> None:
    encoder = load_encoder(modality, str(models / name))
    x = example(modality, encoder)
    found = encoder(x)
    assert encoder.width == width
    assert found.shape == ((3, 2, width) if modality == "audio" else (3, width))
    assert found.dtype == torch.float32
    assert torch.equal(found, encoder(x))
    torch.testing.assert_close(encoder(x[1:2]), found[1:2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[1])


@torch.inference_mode()
def test_frames_are_normalised_as_the_model_says(models: Path) -> None:
    from transformers import AutoModel

    encoder = load_encoder("video", str(models / "clip"))
    frames = example("video", encoder)
    mean, deviation = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]])
    pixels = ((frames / 255 - mean) / deviation).movedim(-1, -3)
    model = AutoModel.from_pretrained(models / "clip").eval()
    expected = model.get_image_features(pixel_values=pixels.flatten(0, 1))
    expected = getattr(expected, "pooler_output", expected).view(3, 2, -1).mean(1)
    torch.testing.assert_close(encoder(frames), expected)
    assert (encoder.size, encoder.frames) == (32, 2)
    assert load_encoder("video", str(models / "videomae")).frames == 4


@torch.inference_mode()
def test_text_is_the_mean_over_its_tokens(models: Path) -> None:
    from transformers import AutoModel

    encoder = load_encoder("text", str(models / "bert"))
    model = AutoModel.from_pretrained(models / "bert").eval()
    ids = [WORDS.index(x) for x in "[CLS] a dog barks [SEP]".split()]
    expected = model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(["a dog barks", "two " * 99])[:1], expected)


@torch.inference_mode()
def test_padding_of_a_model_of_sound_does_not_count(models: Path) -> None:
    """Whisper pads a second to thirty."""
    from transformers import AutoFeatureExtractor, AutoModel

    sound = 0.1 * torch.randn(1, 1, SAMPLES)
    extract = AutoFeatureExtractor.from_pretrained(models / "whisper")
    given = extract(sound[0, 0].numpy(), sampling_rate=SAMPLES, return_tensors="pt")
    encoder = AutoModel.from_pretrained(models / "whisper").get_encoder().eval()
    expected = encoder(given["input_features"]).last_hidden_state[:, :50].mean(1)  # 50 a second
    torch.testing.assert_close(load_encoder("audio", str(models / "whisper"))(sound)[0], expected)


@torch.inference_mode()
def test_the_order_of_frames_matters_to_a_model_of_videos(models: Path) -> None:
    encoder = load_encoder("video", str(models / "videomae"))
    frames = example("video", encoder)
    assert not torch.allclose(encoder(frames), encoder(frames.flip(1)), atol=1e-5)


def test_weights_are_not_unpickled(models: Path, tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "bert"
    folder.mkdir()
    for path in (models / "bert").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_encoder("text", str(folder))
    assert not (tmp_path / "touched").exists()


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def copied(models: Path, name: str, folder: Path, **weights: torch.Tensor) -> Path:
    """A model with other weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    for path in (models / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_missing_or_nan_are_refused(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(models / "bert" / "model.safetensors")
    without = {k: x for k, x in weights.items() if "layer.1" not in k}
    with pytest.raises(DataError, match="weights are missing: encoder"):
        load_encoder("text", str(copied(models, "bert", tmp_path / "without", **without)))
    nan = {k: torch.full_like(x, torch.nan) for k, x in weights.items()}
    with pytest.raises(DataError, match="it gives NaN or Inf"):
        load_encoder("text", str(copied(models, "bert", tmp_path / "nan", **nan)))
    no_pooler = {k: x for k, x in weights.items() if "pooler" not in k}  # which is not used
    load_encoder("text", str(copied(models, "bert", tmp_path / "no-pooler", **no_pooler)))


def test_a_name_that_is_nearly_a_built_in_one() -> None:
    with pytest.raises(DataError, match=r"no such encoder\. Hint: efficientnet-lite0\?"):
        load_encoder("video", "efficientnet")


def test_code_of_a_repository_is_not_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked says yes
    folder = tmp_path / "model"
    folder.mkdir()
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_encoder("audio", str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("modality", "name", "message"),
    [
        ("audio", "wordllama", "is an encoder of text. Hint: one of speech-embedding, log-mel"),
        ("video", "no/such/folder/at-all", "cannot be loaded"),
        ("text", "/nowhere", "cannot be loaded"),
    ],
)
def test_names_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, modality: str, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"--{modality} {name}: {message}"):
        load_encoder(modality, name)


def test_a_model_of_another_modality_says_so(models: Path) -> None:
    with pytest.raises(DataError, match=r"--audio .*bert: cannot be loaded"):
        load_encoder("audio", str(models / "bert"))


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_library_that_is_not_installed_is_named(library: str) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    package = {"open_clip": "open-clip-torch"}.get(library, library)
    with pytest.raises(DataError, match=f"pip install {package}"):
        load_encoder("video", f"{library}:resnet18")
