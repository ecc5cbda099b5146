"""Heads, scores and the directions of transfer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cmg.clips import BACKGROUND, Clips
from cmg.evaluation import Scores, agreement, clip_scores, evaluate, fit_heads, segment_scores
from cmg.heads import Head, TokenNaiveBayes, over_time

WAYS = {f"{a}->{b}" for a in ("audio", "video", "text") for b in ("audio", "video", "text")}
WAYS -= {"audio->audio", "video->video", "text->text"}


def ideal_codes(clips: Clips, width: int = 8) -> dict[str, Tensor]:
    """One shared code per event, as a perfect encoder would give; split 0 shows background."""
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(clips.num_classes + 1, width, generator=generator)
    return {name: book[x - BACKGROUND] for name, x in clips.segment_labels.items()}


def evaluated(codes: dict[str, Tensor], clips: Clips) -> dict[str, Scores]:
    """Evaluate codes whose indices are those of perfect encoders."""
    indices = {name: x - BACKGROUND for name, x in clips.segment_labels.items()}
    indices = {name: i.clamp(max=clips.num_classes) for name, i in indices.items()}
    return evaluate(codes, indices, clips, clips.num_classes + 1)


def test_shared_codes_transfer_perfectly(clips: Clips) -> None:
    blocks = evaluated(ideal_codes(clips), clips)
    assert set(blocks) == {"classification", "localization", "agreement"}
    assert all(set(block) == WAYS for block in blocks.values())
    ideal = {"accuracy": 1.0, "chance": 7 / 20, "upper_bound": 1.0, "token_accuracy": 1.0}
    for scores in blocks["classification"].values():
        assert scores == ideal
    for scores in blocks["agreement"].values():
        assert scores["share"] == 1.0
        assert scores["chance"] == pytest.approx(1 / 3, abs=0.05)  # of three events
    for scores in blocks["localization"].values():
        ones = {name for name, value in scores.items() if value == 1.0}
        assert ones == set(scores) - {"chance", "chance_f1"}


def test_codes_in_separate_places_do_not_transfer(clips: Clips) -> None:
    codes = ideal_codes(clips)
    codes["audio"] = codes["audio"].roll(1, dims=-1)
    scores = evaluated(codes, clips)["classification"]
    assert scores["video->text"]["accuracy"] == 1.0
    assert scores["audio->video"]["upper_bound"] == scores["video->audio"]["upper_bound"] == 1.0
    assert scores["audio->video"]["accuracy"] < 0.7
    assert scores["video->audio"]["accuracy"] < 0.7


def test_the_upper_bound_is_the_target_with_its_own_labels(clips: Clips) -> None:
    codes = ideal_codes(clips)
    noise = torch.Generator().manual_seed(0)
    codes["text"] = torch.randn(codes["text"].shape, generator=noise)
    scores = evaluated(codes, clips)
    for a in ("audio", "video"):
        assert scores["classification"][f"{a}->text"]["upper_bound"] < 0.7
        assert scores["classification"][f"text->{a}"]["upper_bound"] == 1.0
        assert scores["localization"][f"text->{a}"]["upper_bound"] == 1.0


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1.0, 3.0), (1e4, -1e4)])
def test_the_scale_and_origin_of_the_codes_do_not_matter(
    clips: Clips, scale: float, shift: float
) -> None:
    codes = {name: x * scale + shift for name, x in ideal_codes(clips).items()}
    for scores in evaluated(codes, clips)["classification"].values():
        assert scores["accuracy"] == 1.0


def test_codes_that_are_all_the_same_are_at_chance(clips: Clips) -> None:
    codes = {name: torch.ones(120, 4, 8) for name in clips.features}
    for scores in evaluated(codes, clips)["classification"].values():
        assert scores["accuracy"] <= scores["chance"]


def test_the_global_random_state_is_left_alone(clips: Clips) -> None:
    before = torch.get_rng_state()
    first = evaluated(ideal_codes(clips), clips)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluated(ideal_codes(clips), clips) == first


def test_only_split_1_teaches_and_only_split_2_tests(clips: Clips) -> None:
    codes = ideal_codes(clips)
    first = evaluated(codes, clips)
    labels = clips.labels.clone()
    labels[clips.rows(0)] = 10**6
    spoilt = {name: x.clone() for name, x in codes.items()}
    for x in spoilt.values():
        x[clips.rows(0)] = torch.nan
    again = evaluated(spoilt, dataclasses.replace(clips, labels=labels))
    assert again == first


def test_without_segment_labels_there_is_no_localization(clips: Clips) -> None:
    codes = ideal_codes(clips)
    indices = {name: torch.arange(4).expand(120, 4) for name in codes}
    bare = dataclasses.replace(clips, segment_labels={})
    blocks = evaluate(codes, indices, bare, 4)
    assert blocks["localization"] == {}
    # every segment counts
    assert blocks["agreement"]["audio->text"] == {"share": 1.0, "chance": 0.25}


def test_clip_scores_by_hand() -> None:
    scores = clip_scores(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    assert scores == {"accuracy": 0.75, "chance": 0.5}


def test_segment_scores_by_hand() -> None:
    truth = torch.tensor([[1, 1, 2, 0, 0, 0]])
    predicted = torch.tensor([[1, 2, 0, 3, 0, 0]])  # one hit, three claims, three events
    assert segment_scores(predicted, truth) == {
        "segment_f1": pytest.approx(1 / 3),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "segment_accuracy": 0.5,
        "chance": 0.5,
        "chance_f1": pytest.approx(4 / 9),  # event 1 in all six segments: two hits, three events
    }


def test_background_everywhere_has_no_f1() -> None:
    truth = torch.tensor([[1, 0]])
    assert segment_scores(torch.zeros_like(truth), truth)["segment_f1"] == 0.0


def test_a_clip_is_described_by_mean_and_maximum() -> None:
    x = torch.tensor([[[0.0, 4.0], [2.0, -2.0]]])
    assert over_time(x).tolist() == [[1.0, 1.0, 2.0, 4.0]]


def test_the_head_weighs_clips_and_not_segments() -> None:
    x = torch.randn(60, 1, 5, generator=torch.Generator().manual_seed(0))
    y = (x[..., 0] > 0).long()
    once = Head.fit(x, y).probabilities(x[:, 0])
    often = Head.fit(x.expand(60, 7, 5), y.expand(60, 7)).probabilities(x[:, 0])
    torch.testing.assert_close(once, often, atol=1e-3, rtol=0)


def test_a_head_knows_only_the_classes_that_it_saw() -> None:
    x = torch.eye(4).repeat(10, 1)
    head = Head.fit(x, torch.tensor([2, 2, 5, 5]).repeat(10))
    assert head.classes.tolist() == [2, 5]
    assert head(x[:4]).tolist() == [2, 2, 5, 5]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("segments", [None, 5])
def test_a_head_is_logistic_regression(classes: int, segments: int | None) -> None:
    """The same predictions as scikit-learn, with some labels unknown, and one class not shown."""
    generator = torch.Generator().manual_seed(classes)
    shape = (90,) if segments is None else (90, segments)
    x = 3 + 5 * torch.randn(*shape, 6, generator=generator)
    y = torch.randint(-1, classes, shape, generator=generator)
    y[y == 1] = classes  # so that class 1 is missing
    head, used = Head.fit(x, y, C=0.5), y >= 0
    mean, scale = x[used].double().mean(0), x[used].double().var(0, correction=0).mean().sqrt()
    clips = used.flatten(1).any(1).sum().item() if segments else used.sum().item()
    model = LogisticRegression(C=0.5 * clips / int(used.sum()), max_iter=300)
    model.fit(((x[used].double() - mean) / scale).numpy(), y[used].numpy())
    other = 3 + 5 * torch.randn(2000, 6, generator=generator)
    rows = ((other.double() - mean) / scale).numpy()
    assert head.classes.tolist() == model.classes_.tolist()
    assert head(other).tolist() == model.predict(rows).tolist()
    expected = torch.from_numpy(model.predict_proba(rows))
    torch.testing.assert_close(head.probabilities(other), expected)
    assert head(other.view(4, 500, 6)).shape == (4, 500)


def test_a_class_that_one_modality_lacks(clips: Clips) -> None:
    """Its head does not know the class; the others do, and are saved and tested all the same."""
    labels = clips.labels.clone()
    mask = torch.ones(120, 4, dtype=torch.bool)
    mask[clips.rows(1)] = (labels[clips.rows(1)] != 2)[:, None]
    lacking = dataclasses.replace(clips, masks={"audio": mask})
    heads = fit_heads(ideal_codes(lacking), lacking)
    assert heads.clips["audio"].classes.tolist() == [0, 1]
    assert heads.segments["audio"].classes.tolist() == [0, 1, 2]
    assert heads.clips["text"].classes.tolist() == [0, 1, 2]
    scores = evaluated(ideal_codes(lacking), lacking)["classification"]
    assert scores["audio->text"]["accuracy"] < scores["text->audio"]["accuracy"] == 1.0


def test_heads_are_trained_once(clips: Clips) -> None:
    """And the scores of given heads are those of heads that are trained on the spot."""
    codes = ideal_codes(clips)
    heads = fit_heads(codes, clips)
    indices = {name: x - BACKGROUND for name, x in clips.segment_labels.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "fit", None)
        given = evaluate(codes, indices, clips, clips.num_classes + 1, heads)
    assert given == evaluated(codes, clips)


def test_without_labels_there_are_no_heads(clips: Clips) -> None:
    bare = Clips.of(clips.features).holding_out()
    indices = {name: torch.arange(4).expand(120, 4) for name in clips.features}
    assert fit_heads(ideal_codes(clips), bare) == ({}, {})
    blocks = evaluate(ideal_codes(clips), indices, bare, 4)
    assert blocks["classification"] == blocks["localization"] == {}
    assert blocks["agreement"]["audio->text"] == {"share": 1.0, "chance": 0.25}


def test_a_head_of_one_class_predicts_it() -> None:
    assert Head.fit(torch.randn(5, 4), torch.full((5,), 3))(torch.randn(2, 4)).tolist() == [3, 3]


def test_token_naive_bayes_by_hand() -> None:
    indices, labels = torch.tensor([[0, 0, 1], [2, 2, 1]]), torch.tensor([0, 1])
    table = TokenNaiveBayes(indices, labels, codebook_size=3)
    frequency = torch.tensor([3.0, 3.0, 3.0]).double() / 9
    counts = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]).double()
    torch.testing.assert_close(table.table.exp(), (counts + 10 * frequency) / 13)
    assert table(torch.tensor([[0, 1, 1], [2, 1, 0], [1, 2, 2]])).tolist() == [0, 0, 1]


def test_token_naive_bayes_of_segments() -> None:
    indices, labels = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 0], [1, 1]])
    table = TokenNaiveBayes(indices, labels, codebook_size=3)
    assert table(torch.tensor([[0, 2]])).tolist() == [[0, 1]]


def test_agreement_counts_segments_that_show_the_same_event() -> None:
    indices = {
        "audio": torch.tensor([[1, 1, 2, 0]]),
        "video": torch.tensor([[1, 2, 2, 0]]),
        "text": torch.tensor([[1, 2, 2, 0]]),
    }
    shown = {"audio": torch.tensor([[5, 5, -1, 5]]), "video": torch.tensor([[5, 5, -1, 6]])}
    scores = agreement(indices, shown)
    assert scores["audio->video"] == {"share": 0.5, "chance": 0.5}
    assert scores["audio->video"] == scores["video->audio"]
    # without labels of one of them, every segment counts
    assert scores["audio->text"] == {"share": 0.75, "chance": (2 + 2 + 1) / 16}


def test_agreement_where_no_event_is_the_same() -> None:
    indices = {name: torch.zeros(1, 2, dtype=torch.long) for name in ("audio", "video")}
    shown = {name: torch.full((1, 2), BACKGROUND) for name in indices}
    assert agreement(indices, shown)["audio->video"] == {"share": 0.0, "chance": 0.0}
