"""Saved modules: folders, the Hub (offline), versions, and states that do not fit."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from support import peak_growth, same, state
from torch import Tensor, nn

import mmvq
from mmvq.pretrained import Pretrained

NAMES = ("video", "audio", "text")
RATIOS = {("audio", "video"): 0.3, ("text", "audio"): 0.0}
LOSS = mmvq.CrossModalCommitmentLoss(0.5, RATIOS, "sum")
MODULES: dict[str, Pretrained] = {
    "quantizer": mmvq.MultiModalEMAQuantizer(4, 8, NAMES, decay=0.9, commitment=LOSS),
    "without a loss": mmvq.MultiModalEMAQuantizer(4, 8, commitment=None, update_from={"audio"}),
    "codebook": mmvq.EMACodebook(4, 8, groups=3, update_from=range(2), init="samples"),
    "cpc": mmvq.CrossCPC(4, NAMES, context_dim=3, num_layers=2, num_steps=2, first_step=0),
    "club": mmvq.CLUBEstimator(4, 3, 5, negatives="shuffled", logvar_bound=None),
}
each_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def batch(names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: torch.randn(2, 5, 4) for name in names}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same class, settings and tensors."""
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    assert same(a.state_dict(), b.state_dict())


@each_module
def test_a_folder_restores_the_module(module: Pretrained, tmp_path: Path) -> None:
    assert module.save_pretrained(tmp_path / "new") is None
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    loaded = type(module).from_pretrained(tmp_path / "new")
    assert_same(loaded, module)
    assert not loaded.training
    assert loaded._config() == module._config()


def test_training_resumes_from_a_folder(tmp_path: Path) -> None:
    going = mmvq.MultiModalEMAQuantizer(4, 8, NAMES, reset_after=2)
    for _ in range(3):
        going(batch())
    going.save_pretrained(tmp_path)
    loaded = mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path).train()
    for _ in range(3):
        z = batch()
        going(z)
        loaded(z)
    assert_same(loaded, going)


def test_settings_are_saved_as_they_are_now(tmp_path: Path) -> None:
    """And not as they were when the module was built."""
    module = mmvq.MultiModalEMAQuantizer(4, 8, decay=0.9)
    module.ema_codebook.decay = 0.999
    module.commitment = mmvq.CrossModalCommitmentLoss(0.1)
    module.save_pretrained(tmp_path)
    loaded = mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path)
    assert loaded.ema_codebook.decay == 0.999
    assert loaded.commitment.beta == 0.1


def test_a_passed_argument_replaces_the_saved_one(tmp_path: Path) -> None:
    MODULES["quantizer"].save_pretrained(tmp_path)
    loaded = mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path, decay=0.5, commitment=None)
    assert loaded.ema_codebook.decay == 0.5
    assert loaded.commitment is None


class Scaled(nn.Module):
    """A loss with a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, z: dict[str, Tensor], *_: Any) -> Tensor:
        return self.scale * torch.stack([x.square().mean() for x in z.values()]).sum()


def own(z: Tensor, others: Any, masks: Any) -> Tensor:
    return z


def test_an_argument_that_json_cannot_hold_is_passed_again(tmp_path: Path) -> None:
    module = mmvq.MultiModalEMAQuantizer(4, 8, partner=own, commitment=Scaled())
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pass_again"] == {"partner": "own", "commitment": "Scaled"}
    assert not {"partner", "commitment"} & config["arguments"].keys()
    again = {"partner": own, "commitment": Scaled()}
    loaded = mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path, **again)
    assert loaded.partner is own
    assert_same(loaded, module)
    with pytest.raises(ValueError, match=r"hold commitment.\n.*\n.*pass commitment=\.\.\. to from"):
        mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path, partner=own)


def test_a_subclass_saves_its_arguments_and_takes_the_folder_of_its_base(tmp_path: Path) -> None:
    class Tuned(mmvq.CLUBEstimator):
        def __init__(self, x_dim: int, y_dim: int, scale: float = 1.0) -> None:
            super().__init__(x_dim, y_dim)
            self.scale = scale

    Tuned(4, 3, scale=2.0).save_pretrained(tmp_path / "tuned")
    assert Tuned.from_pretrained(tmp_path / "tuned").scale == 2.0
    with pytest.raises(ValueError, match="call from_pretrained of Tuned"):
        mmvq.CLUBEstimator.from_pretrained(tmp_path / "tuned")

    class Scaled(mmvq.CLUBEstimator):
        def __init__(self, *sizes: int, scale: float = 1.0, **options: Any) -> None:
            super().__init__(*sizes, **options)
            self.scale = scale

    Scaled(4, 3, 5, scale=2.0, logvar_bound=None).save_pretrained(tmp_path / "scaled")
    loaded = Scaled.from_pretrained(tmp_path / "scaled")
    assert (loaded.scale, loaded.hidden_dim, loaded.logvar_bound) == (2.0, 5, None)

    class Named(mmvq.CrossCPC):
        """Nothing new."""

    MODULES["cpc"].save_pretrained(tmp_path / "cpc")
    assert type(Named.from_pretrained(tmp_path / "cpc")) is Named


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Replace the Hub by a folder, and list the requests to it."""
    asked: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            asked.append(("token", token))

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append(("create", (repo_id, options)))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            asked.append(("upload", (repo_id, options["commit_message"])))
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append(("download", (allow_patterns, revision)))
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@each_module
def test_to_the_hub_and_back(module: Pretrained, hub: list[tuple[str, Any]]) -> None:
    address = module.push_to_hub("me/book", private=True, token="t", commit_message="first")
    assert address == "https://huggingface.co/me/book/commit/1"
    assert hub == [
        ("token", "t"),
        ("create", ("me/book", {"private": True, "exist_ok": True})),
        ("upload", ("me/book", "first")),
    ]
    hub.clear()
    assert_same(type(module).from_pretrained("me/book", revision="v1"), module)
    assert hub == [("download", (["config.json", "model.safetensors"], "v1"))]


@each_module
def test_a_state_of_a_newer_version_is_refused(module: Pretrained) -> None:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    saved: Any = torch.load(file, weights_only=True)
    assert saved._metadata[""]["version"] == module._version == 1
    module.load_state_dict(saved)
    saved._metadata[""]["version"] = 2
    before = state(module)
    for x in saved.values():
        x.add_(1)
    with pytest.raises(RuntimeError, match="version 2, this mmvq knows up to 1"):
        module.load_state_dict(saved)
    assert same(module.state_dict(), before)
    module.load_state_dict(before)  # bare tensors have no version


def test_a_part_of_the_state_loads_when_asked() -> None:
    """With `strict=False`, as in every module of torch; otherwise missing keys are named."""
    module, other = mmvq.EMACodebook(4, 8), mmvq.EMACodebook(4, 8)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "sums", "counts"'):
        module.load_state_dict({"codes": other.codes})
    missing, unexpected = module.load_state_dict({"codes": other.codes, "more": 1}, strict=False)
    assert torch.equal(module.codes, other.codes)
    assert (len(missing), unexpected) == (len(module.state_dict()) - 1, ["more"])


@each_module
def test_a_tensor_of_another_shape_is_named_with_both_shapes(module: Pretrained) -> None:
    name, x = next(iter(module.state_dict().items()))
    shapes = rf"{len(x) + 1}(.|\n)*{len(x)}"
    with pytest.raises(
        RuntimeError, match=rf"(size mismatch for {name}|{name} does not fit)(.|\n)*{shapes}"
    ):
        module.load_state_dict({**module.state_dict(), name: torch.cat([x, x[:1]])})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", torch.ones(7, 4)),
        ("counts", torch.ones(7)),
        ("codes", torch.ones(8, 4, dtype=torch.complex64)),
        ("ages", torch.ones(1, 8)),
        ("steps", "two"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_as_a_whole(
    name: str, value: Any, assign: bool
) -> None:
    book, other = mmvq.EMACodebook(4, 8, init="kmeans"), mmvq.EMACodebook(4, 8)
    before = state(book)
    with pytest.raises(RuntimeError, match=f"{name} does not fit this module"):
        book.load_state_dict({**other.state_dict(), name: value}, assign=assign)
    assert same(book.state_dict(), before)
    assert not book.ready


def test_a_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    MODULES["quantizer"].save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"ema_codebook\.codes does not fit"):
        mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path, codebook_size=9)


HUGE: list[tuple[Pretrained, dict[str, int]]] = [
    (MODULES["quantizer"], {"codebook_size": 10**9}),
    (MODULES["quantizer"], {"dim": 10**9}),
    (MODULES["codebook"], {"groups": 10**9}),
    (MODULES["cpc"], {"context_dim": 10**7}),
    (MODULES["cpc"], {"num_steps": 10**9}),
    (MODULES["club"], {"hidden_dim": 10**9}),
]


@pytest.mark.parametrize(("module", "changes"), HUGE)
def test_a_config_that_asks_for_more_than_the_file_has_takes_no_memory(
    module: Pretrained, changes: dict[str, int], tmp_path: Path
) -> None:
    module.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "arguments": {**config["arguments"], **changes}}))
    load = f"mmvq.{type(module).__name__}.from_pretrained({str(tmp_path)!r})"
    setup = f"import safetensors.torch, huggingface_hub\n{SAID}said(lambda: mmvq.EMACodebook(2, 2))"
    assert peak_growth(setup, f"assert said(lambda: {load}) == 'RuntimeError'") < 100  # MiB


SAID = """
def said(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
"""


def test_loading_draws_no_random_numbers_twice(tmp_path: Path) -> None:
    """The comparison of sizes leaves the generator alone."""
    MODULES["cpc"].save_pretrained(tmp_path)
    torch.manual_seed(0)
    mmvq.CrossCPC.from_pretrained(tmp_path)
    after = torch.rand(3)
    torch.manual_seed(0)
    mmvq.CrossCPC(4, NAMES, context_dim=3, num_layers=2, num_steps=2, first_step=0)
    assert torch.equal(torch.rand(3), after)


def test_a_damaged_folder_raises_documented_errors(tmp_path: Path) -> None:
    MODULES["quantizer"].save_pretrained(tmp_path)
    draw = random.Random(0)
    files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    refused = 0
    for _ in range(300):
        name = draw.choice(list(files))
        content = bytearray(files[name])
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(min(len(content), 900))] = draw.randrange(256)
        (tmp_path / name).write_bytes(content)
        try:
            mmvq.MultiModalEMAQuantizer.from_pretrained(tmp_path)
        except (ValueError, RuntimeError):
            refused += 1
        (tmp_path / name).write_bytes(files[name])
    assert refused > 200


def test_pending_statistics_are_repeated_not_saved() -> None:
    """As with gradients: a run stopped between micro-batches repeats its batch, exactly."""
    whole = mmvq.MultiModalEMAQuantizer(4, 8, init="uniform", update="manual")
    parts = [batch(("audio", "video")) for _ in range(2)]
    before = state(whole)
    whole(parts[0])
    assert same(whole.state_dict(), before)
    again = mmvq.MultiModalEMAQuantizer(4, 8, update="manual")
    again.load_state_dict(whole.state_dict())
    whole(parts[1])
    for part in parts:
        again(part)
    whole.update_codebook()
    again.update_codebook()
    assert same(again.state_dict(), whole.state_dict())
