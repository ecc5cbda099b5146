"""Models of Hugging Face transformers with random weights, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

INSIDE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat barks two ##s".split()


def images(folder: Path, **settings: Any) -> None:
    """Write the settings of an image processor."""
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of WORDS."""
    from transformers import BertTokenizer

    vocabulary = {word: k for k, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)


def save_models(root: Path) -> None:
    """Write a folder for each of these models, with the name of its type."""
    import transformers as hf

    torch.manual_seed(0)
    side = {"height": 32, "width": 32}
    text = INSIDE | {"vocab_size": len(WORDS), "pad_token_id": 0}
    config = hf.CLIPConfig(
        text_config=text | {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3},
        vision_config=INSIDE | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    hf.CLIPModel(config).save_pretrained(root / "clip")
    images(root / "clip", crop_size=side, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    tokenizer(root / "clip")

    config = hf.Dinov2Config(**INSIDE, image_size=28, patch_size=14)
    hf.Dinov2Model(config).save_pretrained(root / "dinov2")
    images(root / "dinov2", crop_size={"height": 28, "width": 28})

    config = hf.SiglipConfig(
        text_config=text | {"max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 2},
        vision_config=INSIDE | {"image_size": 32, "patch_size": 8},
    )
    hf.SiglipModel(config).save_pretrained(root / "siglip")
    images(root / "siglip", size=side)
    tokenizer(root / "siglip")

    config = hf.VideoMAEConfig(**INSIDE, image_size=32, patch_size=16, num_frames=4)
    hf.VideoMAEModel(config).save_pretrained(root / "videomae")
    images(root / "videomae", size={"shortest_edge": 32})

    config = hf.Wav2Vec2Config(
        **INSIDE, conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(5, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    hf.Wav2Vec2Model(config).save_pretrained(root / "wav2vec2")
    hf.Wav2Vec2FeatureExtractor().save_pretrained(root / "wav2vec2")

    config = hf.ASTConfig(**INSIDE, max_length=100, num_mel_bins=32, patch_size=16)
    hf.ASTModel(config).save_pretrained(root / "ast")
    hf.ASTFeatureExtractor(num_mel_bins=32, max_length=100).save_pretrained(root / "ast")

    sound = {
        "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16,
        "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16,
        "hidden_size": 32, "window_size": 4,
    }  # fmt: skip
    config = hf.ClapConfig(
        text_config=text | {"max_position_embeddings": 514}, audio_config=sound, projection_dim=12
    )
    hf.ClapModel(config).save_pretrained(root / "clap")
    hf.ClapFeatureExtractor(
        feature_size=16, sampling_rate=16_000, max_length_s=1, fft_window_size=1024,
        hop_length=160, truncation="rand_trunc",
    ).save_pretrained(root / "clap")  # fmt: skip
    tokenizer(root / "clap")

    config = hf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    hf.WhisperModel(config).save_pretrained(root / "whisper")
    hf.WhisperFeatureExtractor().save_pretrained(root / "whisper")

    hf.BertModel(hf.BertConfig(**text)).save_pretrained(root / "bert")
    tokenizer(root / "bert")
