"""`mmvq.compat.cmg` against the numbers of the released code, see README.md.

ATOL: both sides run the same float64 operations up to the order of summation. Every value compared
is below 200 and comes from sums of at most 1,536 terms, so one step can differ by about
1536 * 2^-53 * 200 = 3.4e-11; carried over five steps that stays below 1e-9. The bound is absolute,
hence rtol 0. Indices are exact: the two nearest codes differ by 4e-6 or more.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmvq.compat import cmg

ATOL = 1e-9
HERE = Path(__file__).parent
NAMES = {"a": "audio", "v": "video", "t": "text"}
STATE = ("embedding", "ema_count", "ema_weight", "unactivated_count")
VQ = [f"vq_{pair}_{start}" for pair in ("av", "at", "avt") for start in ("cold", "warm")]
CPC = {"av": ("video", "audio"), "avt": ("audio", "video", "text")}
CHECKPOINT_MODULES = {
    "CPC AVT": lambda: cmg.CMGCrossCPC(256, CPC["avt"]),
    "CPC AV": lambda: cmg.CMGCrossCPC(256, CPC["av"]),
    "Video_mi_net": lambda: cmg.CMGCLUB(256, 512),
    "Audio_mi_net": lambda: cmg.CMGCLUB(256, 256),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(HERE / "official_cmg.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def under(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=ATOL, rtol=0)


def quantizer(golden: dict[str, Tensor], case: str) -> cmg.CMGQuantizer:
    size, dim = golden[f"{case}/meta"][:2].tolist()
    names = [NAMES[m] for m in "avt" if f"{case}/step1/in_{m}" in golden]
    module = cmg.CMGQuantizer(dim, size, names).double()
    module.load_state_dict(under(golden, f"{case}/init/"))
    return module


def check_step(module: cmg.CMGQuantizer, step: dict[str, Tensor]) -> None:
    """One forward and backward: outputs, losses, gradients, and the state but for `embedding`."""
    letters = [m for m in "avt" if f"in_{m}" in step]
    z = {m: step[f"in_{m}"].clone().requires_grad_() for m in letters}
    out = module({NAMES[m]: z[m] for m in letters}, generator=torch.Generator().manual_seed(0))
    energy = torch.stack([q.square().sum() for q in out.quantized.values()]).sum()
    total = torch.stack(list(out.losses.values())).sum() + out.matching + 0.01 * energy
    total.backward()
    for m in letters:
        gradient = z[m].grad
        assert gradient is not None
        assert torch.equal(out.indices[NAMES[m]], step[f"idx_{m}"])
        same(out.quantized[NAMES[m]], step[f"out_{m}_q"])
        same(out.losses[NAMES[m]], step[f"out_{m}_loss"])
        same(out.perplexity[NAMES[m]], step[f"out_{m}_ppl"])
        same(gradient, step[f"grad_{m}"])
    same(out.matching, step["out_cmcm"])
    same(out.equal_num, step["out_equal_num"])
    same(total, step["total"])
    for name in STATE[1:]:
        same(module.get_buffer(name), step[f"state/{name}"])


@pytest.mark.parametrize("case", VQ)
def test_quantizer_over_all_steps(golden: dict[str, Tensor], case: str) -> None:
    module = quantizer(golden, case)
    for s in range(1, int(golden[f"{case}/meta"][4]) + 1):
        step = under(golden, f"{case}/step{s}/")
        check_step(module, step)
        same(module.embedding, step["state/embedding"])


@pytest.mark.parametrize("case", ["vq_av_reset", "vq_avt_reset"])
def test_quantizer_with_reset(golden: dict[str, Tensor], case: str) -> None:
    module = quantizer(golden, case)
    for s in range(1, int(golden[f"{case}/meta"][4]) + 1):
        expired = module.unactivated_count == 300
        step = under(golden, f"{case}/step{s}/")
        check_step(module, step)
        expired &= step["state/unactivated_count"] == 0
        assert int(expired.sum()) == (4 if s == 1 else 0)
        kept = step["state/embedding"][~expired]
        same(module.embedding[~expired], kept)
        for rows in (module.embedding, step["state/embedding"]):  # ours and the released draw
            noise = (rows[expired][:, None] - kept).abs().amax(dim=-1)  # [reset, kept]
            assert bool((noise.amin(dim=1) <= 1 / 1024).all())
        module.embedding.copy_(step["state/embedding"])


@pytest.mark.parametrize("case", [*VQ, "vq_av_reset", "vq_avt_reset"])
def test_infer_in_eval_mode(golden: dict[str, Tensor], case: str) -> None:
    module = quantizer(golden, case).eval()
    last = int(golden[f"{case}/meta"][4])
    state = under(golden, f"{case}/step{last}/state/")
    module.load_state_dict(state)
    x = golden[f"{case}/infer/in"].clone().requires_grad_()
    out = module.infer(x)
    same(out, golden[f"{case}/infer/out"])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    assert all(torch.equal(module.get_buffer(name), state[name]) for name in STATE)


def test_forward_in_eval_mode_counts_and_resets_as_released(golden: dict[str, Tensor]) -> None:
    case = "vq_av_reset"
    module = quantizer(golden, case).eval()
    features = {NAMES[m]: golden[f"{case}/step1/in_{m}"] for m in "av"}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(features)
    same(module.unactivated_count, golden[f"{case}/step1/state/unactivated_count"])
    assert torch.equal(module.ema_count, before["ema_count"])
    assert torch.equal(module.ema_weight, before["ema_weight"])
    changed = (module.embedding != before["embedding"]).any(dim=1)
    assert torch.equal(changed, before["unactivated_count"] == 300)


def test_reset_follows_the_generator(golden: dict[str, Tensor]) -> None:
    features = {NAMES[m]: golden[f"vq_av_reset/step1/in_{m}"] for m in "av"}
    rows: list[Tensor] = []
    for seed in (3, 3, 4):
        module = quantizer(golden, "vq_av_reset")
        module(features, generator=torch.Generator().manual_seed(seed))
        rows.append(module.embedding)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_club(golden: dict[str, Tensor]) -> None:
    g = under(golden, "club/")
    module = cmg.CMGCLUB(g["x"].shape[-1], g["y"].shape[-1], hidden_dim=8).double()
    module.load_state_dict(under(g, "param/"))
    x, y = (g[name].clone().requires_grad_() for name in "xy")
    mu, logvar = module.conditional(x)
    same(mu, g["mu"])
    same(logvar, g["logvar"])
    values = {
        "loglikeli": module.log_likelihood(x, y),
        "mi_est": module(x, y, permutation=g["perm"]),
    }
    for name, value in values.items():
        same(value, g[name])
        for gradient, key in zip(torch.autograd.grad(value, (x, y)), ("gx", "gy"), strict=True):
            same(gradient, g[f"{name}_{key}"])


def test_club_draws_its_permutation(golden: dict[str, Tensor]) -> None:
    g = under(golden, "club/")
    module = cmg.CMGCLUB(g["x"].shape[-1], g["y"].shape[-1], hidden_dim=8).double()
    drawn = module(g["x"], g["y"], generator=torch.Generator().manual_seed(5))
    permutation = torch.randperm(len(g["x"]), generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, module(g["x"], g["y"], permutation=permutation))


@pytest.mark.parametrize("pair", CPC)
@pytest.mark.parametrize("steps", [1, 2])
def test_cpc(golden: dict[str, Tensor], pair: str, steps: int) -> None:
    g = under(golden, f"cpc_{pair}_K{steps}/")
    module = cmg.CMGCrossCPC(g["in0"].shape[-1], CPC[pair], num_steps=steps).double()
    module.load_state_dict(under(g, "param/"))
    z = [g[f"in{i}"].clone().requires_grad_() for i in range(len(pair))]
    out = module(dict(zip(CPC[pair], z, strict=True)), start=int(g["t"]))
    same(out.loss, g["nce"])
    same(torch.stack(list(out.accuracy.values())), g["acc"])
    for i, gradient in enumerate(torch.autograd.grad(out.loss, z, retain_graph=True)):
        same(gradient, g[f"grad_in{i}"])
    # Normalised over contexts, a predictor's bias cancels: its gradient is rounding alone.
    biases = [p for name, p in module.named_parameters() if re.search(r"predictors.*bias", name)]
    for gradient in torch.autograd.grad(out.loss, biases):
        same(gradient, torch.zeros_like(gradient))


def test_cpc_draws_its_start_within_bounds(golden: dict[str, Tensor]) -> None:
    module = cmg.CMGCrossCPC(16, num_steps=2).double()
    z = {m: golden[f"cpc_av_K2/in{i}"][:, :5] for i, m in enumerate(module.modalities)}
    allowed = [module(z, start=start).loss.detach() for start in (1, 2)]  # T - K - 1 = 2
    generator = torch.Generator().manual_seed(0)
    drawn = [module(z, generator=generator).loss.detach() for _ in range(20)]
    assert {float(loss) for loss in drawn} == {float(loss) for loss in allowed}


def released_shapes(section: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of one module of a released checkpoint."""
    text = (HERE / "official_checkpoint_keys.txt").read_text()
    (body,) = re.findall(rf"^## {re.escape(section)}:.*\n((?:   .*\n?)*)", text, flags=re.MULTILINE)
    entries = re.findall(r"(\S+) \(([\d, ]*)\)", body)
    return {key: tuple(int(n) for n in re.findall(r"\d+", shape)) for key, shape in entries}


@pytest.mark.parametrize("section", CHECKPOINT_MODULES)
def test_released_names_load(section: str) -> None:
    module = CHECKPOINT_MODULES[section]()
    shapes = released_shapes(section)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    released = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    module.double().load_state_dict(released)
    assert all(torch.equal(module.state_dict()[key], released[key]) for key in shapes)


@pytest.mark.parametrize("section", ["AVT Encoder", "AV Encoder", "AT Encoder"])
def test_released_codebook_loads(section: str) -> None:
    shapes = {
        key.removeprefix("Cross_quantizer."): shape
        for key, shape in released_shapes(section).items()
        if key.startswith("Cross_quantizer.")
    }
    module = cmg.CMGQuantizer(256, 400).double()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    released = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    module.load_state_dict(released)
    assert all(torch.equal(module.get_buffer(key), released[key]) for key in shapes)


def test_released_initial_state() -> None:
    module = cmg.CMGQuantizer(16, 24)
    assert float(module.embedding.abs().max()) <= 1 / 400
    assert torch.equal(module.ema_weight, module.embedding)
    assert torch.equal(module.ema_count, torch.zeros(24))
    assert torch.equal(module.unactivated_count, -torch.ones(24))


def test_float32(golden: dict[str, Tensor]) -> None:
    z = {m: golden[f"vq_avt_warm/step1/in_{m[0]}"].float() for m in ("audio", "video", "text")}
    module = quantizer(golden, "vq_avt_warm").float()
    out = module(z)
    assert {t.dtype for t in (*out.quantized.values(), *out.losses.values())} == {torch.float32}
    assert {module.get_buffer(name).dtype for name in STATE} == {torch.float32}
    assert module.infer(z["audio"]).dtype == torch.float32
    assert cmg.CMGCrossCPC(16)({m: z[m] for m in ("video", "audio")}).loss.dtype == torch.float32
    assert cmg.CMGCLUB(16, 16)(z["audio"], z["video"]).dtype == torch.float32
