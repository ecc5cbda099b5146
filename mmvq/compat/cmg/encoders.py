"""The released encoders and decoders, with the parameter names of their checkpoints.

Source: haihuangcode/CMG, code/src/model/main_model_2.py. Shapes: B batch size, T time, C feature
dimension (video 512, audio 128, text 256), D code dimension (256), H x W cells of the video (7 by
7). Parameters of the release that affect no output are left out; `load_checkpoint` lists them.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mmvq.compat.cmg.quantizer import CMGQuantizer

_HEADS, _LAYERS, _FEED_FORWARD, _DROPOUT = 4, 2, 1024, 0.1  # the temporal encoder's


class CMGVideoPool(nn.Module):
    """The released `Video_Semantic_Encoder`: the sum over cells, with a weight per channel.

    y = sum over cells of x (1 + s), s = sigmoid(W2 relu(W1 mean over cells of x)). As released, the
    attention over cells is a softmax over a dimension of size 1: its weights are all 1.

    Args:
        dim: feature dimension C, divisible by 8.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.se_layer: nn.Sequential = nn.Sequential(
            nn.Linear(dim, dim // 8, bias=False),
            nn.ReLU(),
            nn.Linear(dim // 8, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, H, W, C]` to `[B, T, C]`."""
        scale: Tensor = self.se_layer(x.mean(dim=(2, 3)))
        return x.sum(dim=(2, 3)) * (1 + scale)


class CMGTemporalEncoder(nn.Module):
    """The released `InternalTemporalRelationModule`: two post-norm layers, without positions.

    Args:
        in_dim: feature dimension C.
        dim: code dimension D.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.affine_matrix: nn.Linear = nn.Linear(in_dim, dim)
        layer = nn.TransformerEncoderLayer(dim, _HEADS, _FEED_FORWARD, _DROPOUT, batch_first=True)
        self.encoder: nn.TransformerEncoder = nn.TransformerEncoder(
            layer, _LAYERS, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, C]` to `[B, T, D]`. The release has the time dimension first."""
        y: Tensor = self.encoder(self.affine_matrix(x))
        return y


class CMGResidual(nn.Module):
    """The released residual stack: relu(r + f(r)) with r = relu(x), as its first ReLU is in place.

    Args:
        dim: number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1, bias=False),
        )
        self.stack: nn.ModuleList = nn.ModuleList([nn.ModuleDict({"res_block": block})])

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        change: Tensor = self.get_submodule("stack.0.res_block")(x)
        return (x.relu() + change).relu()


class CMGVideoEncoder(nn.Module):
    """The released `Video_Encoder` of video-specific features.

    Args:
        dim: feature dimension C.
        channels: output channels of the first convolution, and of the other two.
        hidden_dim: hidden width of the perceptron.
    """

    def __init__(self, dim: int, channels: tuple[int, int], hidden_dim: int) -> None:
        super().__init__()
        narrow, wide = channels
        self.conv_stack: nn.Sequential = nn.Sequential(
            nn.Conv2d(dim, narrow, 3),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, 3),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 1),
            CMGResidual(wide),
        )
        self.feed_forward: nn.Sequential = nn.Sequential(
            nn.Linear(wide, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[B, T, H, W, C]` to cells `[B, T, H - 4, W - 4, wide]` and a vector `[B, T, C]`.

        The cells are the decoder's input, the vector CLUB's.
        """
        cells: Tensor = self.conv_stack(rearrange(x, "b t h w c -> (b t) c h w"))
        cells = rearrange(cells, "(b t) c h w -> b t h w c", b=len(x))
        return cells, self.feed_forward(cells.mean(dim=(2, 3)))


class CMGVideoDecoder(nn.Module):
    """The released `Video_Decoder`, from specific cells and the code of a segment.

    Args:
        dim: feature dimension C.
        wide: channels of the specific cells.
        hidden_dim: channels of the hidden layer.
        code_dim: code dimension D.
    """

    def __init__(self, dim: int, wide: int, hidden_dim: int, code_dim: int) -> None:
        super().__init__()
        self.video_linear: nn.Linear = nn.Linear(code_dim, code_dim)
        self.inverse_conv_block: nn.Sequential = nn.Sequential(
            nn.ConvTranspose2d(code_dim + wide, hidden_dim, 3),
            CMGResidual(hidden_dim),
            nn.ConvTranspose2d(hidden_dim, dim, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 1),
        )

    def forward(self, specific: Tensor, codes: Tensor) -> Tensor:
        """Map `[B, T, H - 4, W - 4, wide]` and `[B, T, D]` to `[B, T, H, W, C]`."""
        codes = self.video_linear(codes)[:, :, None, None].expand(*specific.shape[:4], -1)
        x = rearrange(torch.cat([codes, specific], -1), "b t h w c -> (b t) c h w")
        y: Tensor = self.inverse_conv_block(x)
        return rearrange(y, "(b t) c h w -> b t h w c", b=len(specific))


class CMGEncoder(nn.Module):
    """The released `AV_`, `AT_` or `AVT_VQVAE_Encoder`.

    Args:
        dims: modality -> C, for two or three of audio, video and text. Released: 128, 512 and 256
            (the output of the text's LSTM).
        code_dim: code dimension D.
        codebook_size: number of codes L.
        channels: `channels` of `CMGVideoEncoder`.
        hidden_dim: `hidden_dim` of `CMGVideoEncoder`.
    """

    def __init__(
        self,
        dims: dict[str, int],
        code_dim: int = 256,
        codebook_size: int = 400,
        *,
        channels: tuple[int, int] = (1024, 2048),
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.modalities: tuple[str, ...] = tuple(dims)
        self.Cross_quantizer: CMGQuantizer = CMGQuantizer(code_dim, codebook_size, self.modalities)
        for name, dim in dims.items():
            self.add_module(f"{name}_self_att", CMGTemporalEncoder(dim, code_dim))
            if name == "video":
                self.video_semantic_encoder: CMGVideoPool = CMGVideoPool(dim)
                self.Video_encoder: CMGVideoEncoder = CMGVideoEncoder(dim, channels, hidden_dim)
            else:
                linear = nn.ModuleDict({f"{name}_linear": nn.Linear(dim, code_dim)})
                self.add_module(f"{name.title()}_encoder", linear)

    @property
    def quantizer(self) -> CMGQuantizer:
        """The shared codebook."""
        return self.Cross_quantizer

    def semantic(self, name: str, x: Tensor) -> Tensor:
        """Encode semantic features, Phi (Eq. 1): `[B, T, C]` -> `[B, T, D]`.

        For video, x is `[B, T, H, W, C]`.
        """
        if name == "video":
            x = self.video_semantic_encoder(x)
        z: Tensor = self.get_submodule(f"{name}_self_att")(x)
        return z

    def specific(self, name: str, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Encode specific features, Psi (Eq. 1): `[B, T, C]` -> `[B, T, D]`.

        For video, see `CMGVideoEncoder`.
        """
        if name == "video":
            both: tuple[Tensor, Tensor] = self.Video_encoder(x)
            return both
        y: Tensor = self.get_submodule(f"{name.title()}_encoder.{name}_linear")(x)
        return y.relu()

    def infer(self, name: str, x: Tensor) -> Tensor:
        """Return the code of every segment, straight-through: the downstream heads' input."""
        return self.quantizer.infer(self.semantic(name, x))


class CMGDecoder(nn.Module):
    """The released decoders, each from a modality's specific features and its codes.

    Args:
        dims: modality -> feature dimension C.
        code_dim: code dimension D.
        wide: channels of the video's specific cells.
        hidden_dim: hidden channels of the video's decoder.
    """

    def __init__(
        self, dims: dict[str, int], code_dim: int = 256, *, wide: int = 2048, hidden_dim: int = 1024
    ) -> None:
        super().__init__()
        for name, dim in dims.items():
            if name == "video":
                decoder: nn.Module = CMGVideoDecoder(dim, wide, hidden_dim, code_dim)
            else:
                decoder = nn.ModuleDict(
                    {
                        f"{name}_linear": nn.Linear(code_dim, code_dim),
                        f"{name}_rec": nn.Linear(2 * code_dim, dim),
                    }
                )
            self.add_module(f"{name.title()}_decoder", decoder)

    def forward(self, name: str, specific: Tensor, codes: Tensor) -> Tensor:
        """Map specific features and codes `[B, T, D]` to the features."""
        decoder = self.get_submodule(f"{name.title()}_decoder")
        if name == "video":
            x: Tensor = decoder(specific, codes)
        else:
            codes = decoder.get_submodule(f"{name}_linear")(codes)
            x = decoder.get_submodule(f"{name}_rec")(torch.cat([codes, specific], -1))
        return x


class CMGHead(nn.Module):
    """The released `Semantic_Decoder` for clips, and `Semantic_Decoder_AVVP` for segments.

    Args:
        dim: code dimension D.
        num_classes: number of event classes.
        per_segment: whether to classify each segment, without the maximum over time.
    """

    def __init__(self, dim: int, num_classes: int, *, per_segment: bool = False) -> None:
        super().__init__()
        self.linear: nn.Linear = nn.Linear(dim, dim)
        self.event_classifier: nn.Linear = nn.Linear(dim, num_classes)
        self.per_segment = per_segment

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes `[B, T, D]` to logits `[B, classes]`, per segment `[B, T, classes]`."""
        x = self.linear(codes)
        logits: Tensor = self.event_classifier(x if self.per_segment else x.amax(dim=1))
        return logits
