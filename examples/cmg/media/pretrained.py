"""Encoders from other libraries: transformers, timm, open_clip, sentence-transformers.

A name without a prefix is a model of transformers, on the Hub or in a local folder. What it gives
for a segment is, in this order, the embedding that it shares with text or images (CLIP, SigLIP,
CLAP), its pooled output if that is trained (DINOv2, AST, ConvNeXt), or the mean of its last hidden
states (VideoMAE, wav2vec2, ViT, BERT and other sentence encoders). Frames are scaled so that the
shorter side has the size of the model, and cropped to the centre; mean and deviation are the
model's own.

Weights are read from safetensors, or by torch's own reader of tensors alone; code of a repository
is never run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import DataError, optional_import
from .encoders import Encoder, Images, width_of

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_PACKAGES = {"open_clip": "open-clip-torch"}
_AT_ONCE = 32  # segments in a batch
_POOLED = ("dino", "audio-spectrogram-transformer", "convnext", "resnet", "swin")


def load_pretrained(modality: str, name: str) -> Encoder:
    """Load an encoder of another library, see `load_encoder`."""
    library, _, rest = name.partition(":")
    loaders = {
        ("video", "timm"): _timm,
        ("video", "open_clip"): _open_clip_image,
        ("text", "open_clip"): OpenClipText,
        ("text", "sentence-transformers"): SentenceTransformerText,
    }
    load = loaders.get((modality, library)) if rest else None
    package = library if load else "transformers"
    package = _PACKAGES.get(package, package)
    with optional_import(f"--{modality} {name}", f"pip install {package}"):
        try:
            if load is not None:
                return load(rest)
            return {"video": _video, "audio": Sound, "text": Text}[modality](name)
        except (ImportError, DataError):
            raise
        except Exception as error:  # models of any kind, files of any state
            text = " ".join(str(error).split()) or type(error).__name__
            hint = "a built-in encoder (see --help), or the name or folder of a model"
            raise DataError(
                f"--{modality} {name}: cannot be loaded ({text:.200}). Hint: {hint}."
            ) from error


class Output(nn.Module):
    """What a model of transformers gives for a segment, [n, C].

    Args:
        model: The model.
        kind: "image", "audio" or "text".
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model = model
        self.shared = getattr(model, f"get_{kind}_features", None)
        self.pooled = model.config.model_type.startswith(_POOLED)

    def forward(self, mask: Tensor | None = None, share: float = 1.0, **inputs: Tensor) -> Tensor:
        """Encode.

        Args:
            mask: Padding mask [n, positions] of text.
            share: Share of the positions that are not padding, of sound.
            inputs: Of the model.
        """
        given = inputs if mask is None else {**inputs, "attention_mask": mask}
        found = (self.shared or self.model)(**given)
        if isinstance(found, Tensor):
            return found
        if (self.shared or self.pooled) and found.pooler_output is not None:
            return found.pooler_output.flatten(1)
        x = found.last_hidden_state  # [n, positions, C], or [n, C, h, w] of a convolution
        if x.ndim > 3:
            return x.flatten(2).mean(2)
        if mask is None or mask.shape[1] != x.shape[1]:
            return x[:, : math.ceil(share * x.shape[1])].mean(1)
        weight = mask[..., None].to(x)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def _model(kind: Any, name: str) -> nn.Module:
    """A model of transformers with all its weights; a pooler is not used where it has none."""
    model, info = kind.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    if missing := sorted(x for x in info["missing_keys"] if "pooler" not in x):
        raise ValueError(f"weights are missing: {', '.join(missing):.80}")
    return model


def _video(name: str) -> Encoder:
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    settings = {**_IMAGENET, **ImageProcessingMixin.get_image_processor_dict(name)[0]}
    network = Output(_model(AutoModel, name), "image").eval()
    config = network.model.config
    size = _side(settings.get("crop_size")) or _side(settings.get("size"))
    size = size or getattr(config, "image_size", 224)
    given = (size, settings["image_mean"], settings["image_std"])
    if frames := getattr(config, "num_frames", 0):
        return Images(_Pixels(network), *given, frames, together=True)
    return Images(_Pixels(network), *given)


def _side(size: Any) -> int:
    """The side of an image from a setting of an image processor; 0 if there is none."""
    if isinstance(size, Mapping):
        return int(size.get("height") or size.get("shortest_edge") or 0)
    return int(size or 0)


class _Pixels(nn.Module):
    """A model of transformers as a function of its pixels."""

    def __init__(self, network: Output) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x)


class Sound(Encoder):
    """A model of sound of transformers, segment by segment."""

    def __init__(self, name: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModel

        super().__init__()
        self.extract = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        self.network = Output(_model(AutoModel, name), "audio").eval()
        self.rate = int(self.extract.sampling_rate)
        with torch.inference_mode():
            self.width = width_of(self(torch.zeros(1, 1, self.rate)))

    def forward(self, sound: Tensor) -> Tensor:
        """Encode sound float32 [n, T, samples]."""
        waves, device = rearrange(sound, "n t s -> (n t) s"), next(self.parameters()).device
        longest = max(getattr(self.extract, "n_samples", 0), waves.shape[1])  # Whisper pads to 30 s
        found = []
        for part in waves.split(_AT_ONCE):
            given = self.extract(
                [x.numpy() for x in part.cpu()], sampling_rate=self.rate, return_tensors="pt"
            )
            inputs = {key: x.to(device) for key, x in given.items() if key != "attention_mask"}
            found.append(self.network(share=waves.shape[1] / longest, **inputs).float().cpu())
        return torch.cat(found).unflatten(0, sound.shape[:2])


class Text(Encoder):
    """A model of text of transformers, line by line."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.network = Output(_model(AutoModel, name), "text").eval()
        config = self.network.model.config
        config = getattr(config, "text_config", config)
        positions = getattr(config, "max_position_embeddings", 512)
        # SigLIP takes its last position, padding included, as in its training
        self.padding = "max_length" if config.model_type.startswith("siglip") else "longest"
        self.longest = min(self.tokenizer.model_max_length, positions, 512)
        with torch.inference_mode():
            self.width = width_of(self(["a"]))

    def forward(self, lines: Sequence[str]) -> Tensor:
        """Encode lines of text; longer ones are cut off at the model's length."""
        device, found = next(self.parameters()).device, []
        for start in range(0, len(lines), _AT_ONCE):
            given = self.tokenizer(
                [*lines[start : start + _AT_ONCE]],
                padding=self.padding,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(device)
            mask = given.pop("attention_mask", None)
            found.append(self.network(mask, **given).float().cpu())
        return torch.cat(found)


def _timm(name: str) -> Images:
    import timm

    network = timm.create_model(name, pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(network)
    return Images(network, data["input_size"][-1], data["mean"], data["std"])


def _open_clip(name: str) -> tuple[nn.Module, str]:
    """A model and its name; NAME, NAME/WEIGHTS, hf-hub:NAME or local-dir:FOLDER."""
    import open_clip

    if ":" in name or "/" not in name:
        return open_clip.create_model_from_pretrained(name, return_transform=False), name
    name, weights = name.split("/", 1)
    return open_clip.create_model(name, pretrained=weights), name


def _open_clip_image(name: str) -> Images:
    model = _open_clip(name)[0].eval()
    visual: Any = model.visual
    side = visual.image_size
    settings = getattr(visual, "preprocess_cfg", None) or {}
    mean = settings.get("mean") or (0.48145466, 0.4578275, 0.40821073)
    deviation = settings.get("std") or (0.26862954, 0.26130258, 0.27577711)
    return Images(visual, side[0] if isinstance(side, tuple) else side, mean, deviation)


class OpenClipText(Encoder):
    """The text model of open_clip."""

    def __init__(self, name: str) -> None:
        import open_clip

        super().__init__()
        self.model, architecture = _open_clip(name)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(architecture)
        with torch.inference_mode():
            self.width = width_of(self(["a"]))

    def forward(self, lines: Sequence[str]) -> Tensor:
        """Encode lines of text."""
        tokens = self.tokenizer([*lines]).to(next(self.parameters()).device)
        return self.model.encode_text(tokens).float().cpu()


class SentenceTransformerText(Encoder):
    """A model of sentence-transformers, with its own pooling."""

    def __init__(self, name: str) -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__()
        self.model = SentenceTransformer(name, device="cpu")
        self.width = width_of(self(["a"]))

    def forward(self, lines: Sequence[str]) -> Tensor:
        """Encode lines of text."""
        found = self.model.encode([*lines], convert_to_tensor=True, show_progress_bar=False)
        return found.float().cpu()
