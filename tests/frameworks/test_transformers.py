"""Hugging Face transformers: a `PreTrainedModel` that holds a quantizer and Cross-CPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import same, state, uniform
from torch import Tensor, nn

from mmvq import CrossCPC, EMACodebook, MultiModalEMAQuantizer
from mmvq.cpc import Predictors
from mmvq.functional import UNSEEN

transformers: Any = pytest.importorskip("transformers")
safetensors: Any = pytest.importorskip("safetensors.torch")

NAMES = ("audio", "text", "video")
B, T, D, L = 4, 5, 8, 16
STATE = ("codes", "sums", "counts", "ages", "usage", "steps", "initialized")


class Config(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "shared-codes"

    def __init__(self, codes: int = L, init: str = "samples", **rest: Any) -> None:
        self.codes, self.init = codes, init
        super().__init__(**rest)


class Encoder(transformers.PreTrainedModel):  # type: ignore[misc]
    """The base model, without a codebook."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = nn.Linear(D, D)
        self.build(config)
        self.post_init()

    def build(self, config: Config) -> None:
        """What a model has beside the encoder."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.encoder(value) for name, value in x.items()}


class Plain(Encoder):
    """With a codebook, as one writes it who has not read the guide."""

    def build(self, config: Config) -> None:
        self.quantizer = MultiModalEMAQuantizer(
            D, config.codes, NAMES, update_from=("audio",), init=config.init, reset_after=2
        )
        self.cpc = CrossCPC(D, NAMES)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        z = super().forward(x)
        loss: Tensor = self.quantizer(z).loss + self.cpc(z, start=2).loss
        return loss


class Model(Plain):
    """As the guide says."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (EMACodebook, Predictors)):
            module.reset_parameters()


def batch(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {m: uniform(B, T, D, dtype=dtype, seed=seed + 7 * i) for i, m in enumerate(NAMES)}


def trained(kind: type[Plain] = Model, **options: Any) -> Any:
    model = kind(Config(**options)).train()
    for seed in (1, 2, 3):
        model(batch(seed))
    assert int(model.quantizer.ema_codebook.steps) == 3
    return model


def load(kind: type[Encoder], folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, local_files_only=True, **options)


def as_built(book: EMACodebook) -> bool:
    """The whole state is that of a new codebook of this size and start."""
    fresh = EMACodebook(book.dim, book.codebook_size, groups=book.groups, init=book.init)
    new, now = state(fresh), state(book)
    drawn, wanted = now.pop("codes"), new.pop("codes")
    assert drawn.dtype == wanted.dtype
    return (
        same(now, new)
        and bool((drawn.abs() <= 1 / book.codebook_size).all())
        and len(drawn.unique()) > drawn.numel() / 2
    )


@pytest.mark.parametrize("kind", [Plain, Model])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["5GB", "1KB"])
def test_a_trained_model_comes_back_to_the_bit(
    tmp_path: Path, kind: type[Plain], dtype: torch.dtype | None, shards: str
) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    again, info = load(kind, tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert not again.training
    assert again.encoder.weight.dtype == (dtype or torch.float32)
    assert torch.equal(again.encoder.weight, model.encoder.weight.to(again.dtype))
    assert torch.equal(again.cpc.predictors["text"], model.cpc.predictors["text"].to(again.dtype))
    assert same(state(again.quantizer), state(model.quantizer))
    assert len(list(again.quantizer.buffers())) == len(state(again.quantizer))


@pytest.mark.parametrize("kind", [Plain, Model])
def test_a_loaded_codebook_trains_on_as_if_never_saved(tmp_path: Path, kind: type[Plain]) -> None:
    """Four steps more: with `update_from`, resets and votes, which no buffer may hold."""
    model = trained(kind)
    model.save_pretrained(tmp_path)
    again = load(kind, tmp_path).train()
    for seed in (4, 5, 6, 7):
        assert torch.equal(again(batch(seed)), model(batch(seed)))
    assert int(again.quantizer.ema_codebook.steps) == 7
    assert same(state(again), state(model))


def test_float64_is_kept_where_the_model_is_float64(tmp_path: Path) -> None:
    model = trained()
    model.quantizer({m: x.double() for m, x in batch(4).items()})
    model.save_pretrained(tmp_path)
    again = load(Model, tmp_path, dtype=torch.float64)
    assert again.quantizer.codebook.dtype == torch.float64
    assert same(state(again.quantizer), state(model.quantizer))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casts_of_the_whole_model_leave_the_state(tmp_path: Path, cast: str) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    again = getattr(load(Model, tmp_path), cast)()
    assert again.encoder.weight.dtype.itemsize == 2
    assert same(state(again.quantizer), state(model.quantizer))


@pytest.mark.parametrize("init", ["kmeans", "samples", "uniform"])
def test_a_checkpoint_without_a_codebook_starts_one(tmp_path: Path, init: str) -> None:
    """The file of a base encoder; whatever the fresh memory holds."""
    base = Encoder(Config())
    base.save_pretrained(tmp_path)
    model, info = load(Model, tmp_path, config=Config(init=init), output_loading_info=True)
    book = model.quantizer.ema_codebook
    assert {f"quantizer.ema_codebook.{name}" for name in STATE} <= info["missing_keys"]
    assert torch.equal(model.encoder.weight, base.encoder.weight)
    assert as_built(book)
    assert int(book.initialized) == (init == "uniform")
    for weight in model.cpc.predictors.values():  # W_k, in +-1/sqrt(context_dim)
        assert len(weight.unique()) > weight.numel() / 2
        assert (weight.abs() <= D**-0.5).all()

    alone = Plain(Config(init=init)).train().quantizer
    if init == "uniform":
        alone.load_state_dict(state(model.quantizer))
    z = Encoder.forward(model, batch(1))
    for call in (lambda: model.train()(batch(1)), lambda: alone(z)):
        torch.manual_seed(3)
        call()
    assert int(book.steps) == int(book.initialized) == 1
    assert same(state(model.quantizer), state(alone))  # the first codes are of the first batch


def test_a_base_encoder_loads_the_file_of_a_whole_model(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    base, info = load(Encoder, tmp_path, output_loading_info=True)
    assert torch.equal(base.encoder.weight, model.encoder.weight)
    assert {f"quantizer.ema_codebook.{name}" for name in STATE} <= info["unexpected_keys"]
    assert not info["missing_keys"]


def test_another_size_is_refused_or_starts_whole(tmp_path: Path) -> None:
    """`steps` and `initialized` have the same shape: taken alone, they would lie."""
    trained().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(Model, tmp_path, config=Config(codes=2 * L))
    model = load(Model, tmp_path, config=Config(codes=2 * L), ignore_mismatched_sizes=True)
    book = model.quantizer.ema_codebook
    assert book.codes.shape == (2 * L, D)
    assert as_built(book)
    model.train()(batch(1))
    assert int(book.steps) == int(book.initialized) == 1


@pytest.mark.parametrize("lost", [("counts",), ("initialized", "steps"), ("codes", "sums")])
def test_a_file_with_a_part_of_the_state_starts_whole(
    tmp_path: Path, lost: tuple[str, ...]
) -> None:
    trained().save_pretrained(tmp_path)
    edit(tmp_path, drop=lost)
    assert as_built(load(Model, tmp_path).quantizer.ema_codebook)


def test_a_file_of_an_older_mmvq_loads(tmp_path: Path) -> None:
    """Its `initialized` is bool."""
    model = trained()
    model.save_pretrained(tmp_path)
    edit(tmp_path, initialized=torch.tensor(True))
    assert same(state(load(Model, tmp_path).quantizer), state(model.quantizer))


def edit(folder: Path, drop: tuple[str, ...] = (), **changed: Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    prefix = "quantizer.ema_codebook."
    tensors |= {prefix + name: value for name, value in changed.items()}
    kept = {name: x for name, x in tensors.items() if name.removeprefix(prefix) not in drop}
    assert len(kept) == len(tensors) - len(drop)
    safetensors.save_file(kept, path, metadata={"format": "pt"})


def test_what_was_loaded_is_drawn_anew_only_by_its_owner(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    again = load(Model, tmp_path)
    again.init_weights()  # transformers': leaves alone what was loaded
    assert same(state(again), state(model))
    again.quantizer.ema_codebook.reset_parameters()  # torch's: starts anew
    assert as_built(again.quantizer.ema_codebook)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_built_on_meta(assign: bool) -> None:
    model = trained()
    with torch.device("meta"):
        empty = Model(Config()).train()
    assert all(x.is_meta for x in empty.state_dict().values())
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(state(model), assign=assign)
    assert same(state(empty), state(model))
    for seed in (4, 5):
        assert torch.equal(empty(batch(seed)), model(batch(seed)))
    assert same(state(empty), state(model))


def test_a_model_built_on_meta_without_a_file() -> None:
    with torch.device("meta"):
        model = Model(Config())
    model.to_empty(device="cpu")
    for x in model.buffers():
        x.fill_(77)
    model.init_weights()
    assert as_built(model.quantizer.ema_codebook)


def test_a_wrong_codebook_would_be_seen() -> None:
    """`as_built` tells a codebook that was trained, or is in part another's."""
    book = EMACodebook(D, L, groups=3, init="samples")
    assert as_built(book)
    for name, x in state(book).items():
        x = x * 0 if name == "codes" else x + 1
        getattr(book, name).copy_(x)
        assert not as_built(book)
        book.reset_parameters()
    assert (book.ages == UNSEEN).all()
