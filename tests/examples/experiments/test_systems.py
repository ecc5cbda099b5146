"""The systems of Table 1: every objective trains every encoder and is what its paper says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmg.batches import Batch, Batches
from cmg.clips import Clips
from cmg.model import Config, UniCode
from cmg.training import Recipe
from experiments.matrix import ALL, AV, Experiment
from experiments.systems import ALIGNMENTS, System, build
from experiments.systems.base import TEMPERATURE, clip_vectors, margin_softmax
from experiments.systems.codis import MOMENTUM, transport_plan
from experiments.systems.mst import SHARED
from experiments.systems.smit import ALPHA, adaptive_mean_margin
from experiments.systems.turn import Rebuild
from experiments.train import SystemTrainer
from mmvq.functional import code_matching, info_nce

SHAPES = {"audio": (1, 7), "video": (4, 6)}
B, T, K = 8, 5, 11
each_system = pytest.mark.parametrize("name", ALIGNMENTS)
each_phase = pytest.mark.parametrize("quantize", [False, True])


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(B, T, *shape) for name, shape in SHAPES.items()}


def system(name: str) -> System:
    torch.manual_seed(0)
    without = ("club", "cpc", "mm-ema", "reset", "matching")
    model = build(Config(SHAPES, T, dim=16, width=8, codebook_size=K, without=without), name)
    assert isinstance(model, System)
    return model


@each_phase
@each_system
def test_an_alignment_is_finite_and_moves_every_encoder(name: str, quantize: bool) -> None:
    model, x = system(name), batch()
    terms = model.losses(Batch(x), model.encode(Batch(x)), quantize=quantize)
    assert all(math.isfinite(term.item()) for term in terms.values())
    terms["alignment"].backward()
    for encoder in model.semantic.values():
        for part in ("describe", "segment", "clip"):
            assert encoder.get_submodule(part)[0].weight.grad.abs().sum() > 0
    assert not any(p.grad is not None and p.grad.isnan().any() for p in model.parameters())


@each_system
def test_an_alignment_only_looks_at_the_codebook(name: str) -> None:
    model, x = system(name), batch()
    features = model.encode(Batch(x))
    UniCode.losses(model, Batch(x), features, quantize=True)
    before = {k: v.clone() for k, v in model.quantizer.state_dict().items()}
    model.alignment(model, x, features, quantize=True)
    for key, value in model.quantizer.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: e.name)
def test_every_experiment_builds_and_its_terms_have_weights(
    experiment: Experiment, tmp_path: Path
) -> None:
    x = {name: torch.randn(B, T, 1, 6) for name in experiment.modalities}
    sizes = {"dim": 16, "width": 8, "codebook_size": 8}
    config = Config(dict.fromkeys(x, (1, 6)), T, **{**experiment.settings(), **sizes})
    model = build(config, experiment.alignment)
    terms = model.losses(Batch(x), model.encode(Batch(x)), quantize=True)
    objectives = {"club", "cpc", "matching"} - set(experiment.config.get("without", ()))
    objectives |= {"alignment"} if experiment.alignment else set()
    assert set(terms) == {"reconstruction", "commitment"} | objectives
    rows = torch.arange(B)
    data = (model, Batches(Clips.of(x)), rows, rows, Recipe(spread=0, ramp=0), tmp_path, {})
    plain, strong = (SystemTrainer(experiment, s, *data)._weights() for s in (1.0, 3.0))
    assert set(terms) <= set(plain)
    raised = {name for name in terms if strong[name] != plain[name]}
    assert raised == experiment.strengthened() & set(terms) != set()
    assert all(strong[name] == 3 * plain[name] for name in raised)


def test_without_a_margin_the_softmax_is_info_nce() -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(B, 6), dim=-1) for _ in range(2))
    expected = info_nce(a, b, temperature=TEMPERATURE, symmetric=True)
    found = margin_softmax(a, b, lambda cosines: cosines.new_tensor(0.0))
    torch.testing.assert_close(found, expected)
    assert margin_softmax(a, b, lambda cosines: cosines.new_tensor(0.1)) > expected


def test_the_adaptive_margin_is_that_of_the_equation() -> None:
    s = torch.rand(4, 4)
    for i, found in enumerate(adaptive_mean_margin(s)):
        others = [s[i, j] for j in range(4) if j != i]
        torch.testing.assert_close(found, ALPHA * (s[i, i] - sum(others) / 3))


def test_mst_shares_all_but_input_normalisation_and_output() -> None:
    model = system("mst")
    audio, video = model.semantic.values()
    for name in SHARED:
        assert audio.get_submodule(name) is video.get_submodule(name)
    for name in ("describe", "skip", "context.norm1", "segment.1", "clip.0", "clip.1"):
        assert audio.get_submodule(name) is not video.get_submodule(name)
    apart = build(model.config, None)
    apart.load_state_dict({k: v for k, v in model.state_dict().items() if "alignment" not in k})
    x = Batch(batch())
    for one, other in zip(
        model.eval().encode(x).semantic.values(),
        apart.eval().encode(x).semantic.values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_margin_has_a_gradient() -> None:
    """If the margin is the cosine itself, nothing pulls a positive pair together."""
    cosines = torch.rand(B, B, requires_grad=True)  # of unit vectors a with an orthonormal b
    margin_softmax(cosines, torch.eye(B), lambda rows: rows.diagonal()).backward()
    assert cosines.grad is not None
    torch.testing.assert_close(cosines.grad.diagonal(), torch.zeros(B))
    assert (cosines.grad + torch.eye(B) > 0).all()


def test_cmcm_matches_the_codes_of_clips_as_soon_as_there_are_codes() -> None:
    model, x = system("cmcm").eval(), batch()
    features = model.encode(Batch(x))
    z, codebook = features.semantic, torch.randn(K, 16)
    model.quantizer.set_codes(codebook)
    found = model.alignment(model, x, features, quantize=True)
    codes = model.quantizer(z, freeze=True).quantized
    a, b = clip_vectors({name: v + codes[name] for name, v in z.items()}).values()
    contrast = margin_softmax(a, b, lambda cosines: cosines.new_tensor(0.001))
    torch.testing.assert_close(found, contrast + 0.1 * code_matching(z, codebook))
    assert model.alignment(model, x, features, quantize=False) != found


def test_turn_rebuilds_hidden_segments_and_sees_the_others() -> None:
    rebuild = Rebuild(6, T, 16, 2).eval()
    x, code, seen, made = torch.randn(B, T, 2, 3), torch.randn(B, 16), [], []
    rebuild.enter.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    rebuild.leave.register_forward_hook(lambda _, inputs, out: made.append(out))
    error = rebuild(x, code)
    flat = x.flatten(2)
    hidden = (seen[0] == rebuild.mask).all(-1)
    assert hidden.any(1).all()
    assert hidden.float().mean() > 0.4
    torch.testing.assert_close(seen[0][~hidden], flat[~hidden])
    expected = (made[0] - flat)[hidden].abs().mean() / flat.abs().mean()
    torch.testing.assert_close(error, expected)
    two = (hidden.sum(1) > 1).nonzero()[0, 0]  # two hidden segments of a clip differ by their place
    assert made[0][two][hidden[two]].std(0).min() > 0


def test_turn_rebuilds_a_modality_from_the_code_of_another() -> None:
    model, x = system("turn"), batch()
    given = {}
    for name, rebuild in model.alignment.rebuild.items():
        rebuild.register_forward_hook(
            lambda _, inputs, out, name=name: given.update({name: inputs})
        )
    features = model.encode(Batch(x))
    model.alignment(model, x, features, quantize=False)
    for name, other in (("audio", "video"), ("video", "audio")):
        segments, code = given[name]
        assert segments is x[name]
        torch.testing.assert_close(code, features.semantic[other].mean(1))


def test_codis_teachers_follow_slowly_and_only_in_training() -> None:
    model, x = system("codis"), batch()
    teacher = model.alignment.teacher["audio"].recall.weight
    student = model.semantic["audio"].recall.weight
    with torch.no_grad():
        student += 1
    before = teacher.clone()
    model.losses(Batch(x), model.encode(Batch(x)), quantize=False)
    torch.testing.assert_close(teacher, MOMENTUM * before + (1 - MOMENTUM) * student.detach())
    after = teacher.clone()
    model.eval().losses(Batch(x), model.encode(Batch(x)), quantize=False)
    torch.testing.assert_close(teacher, after, rtol=0, atol=0)


def test_a_transport_plan_gives_every_clip_a_whole_and_uses_all_prototypes() -> None:
    scores = torch.full((12, 4), 0.0)
    scores[:, 0] = 0.05  # everybody's favourite
    scores += 0.01 * torch.randn(12, 4)
    plan = transport_plan(scores)
    torch.testing.assert_close(plan.sum(1), torch.ones(12))
    assert (plan.sum(0) - 3).abs().max() < 0.1  # 12 clips over 4 prototypes
    assert (scores / 0.05).softmax(1).sum(0).max() > 4.5  # without transport they crowd


def test_the_audio_video_experiments_differ() -> None:
    seen = [repr((e.alignment, dict(e.config), e.clips)) for e in ALL if e.modalities == AV]
    assert len(seen) == len(set(seen))
