"""mmvq against the released code: the settings and factors of docs/migration.md and equations.md.

EXACT: both sides are the same float64 operations in another order, on values below 100 in sums of
at most 500 terms: 500 * 2^-53 * 100 = 6e-12.
"""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Literal

import pytest
import torch
from support import close, rounding, uniform
from torch import Tensor, nn

import mmvq
from mmvq.compat import cmg
from mmvq.compat.cmg.club import three_hidden_layers
from mmvq.compat.cmg.quantizer import perplexity

B, T, D, L = 4, 6, 5, 12
NAMES = ("audio", "video", "text")
EXACT = 1e-11
FLOAT32 = rounding(torch.float32, 2 * L, L)  # of a perplexity; its L * 1e-10 is below that
BETA = 0.25  # commitment_cost
PAIRS = [NAMES[:2], NAMES]


def features(names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, Tensor]:
    """Features [B, T, D] that require gradients."""
    return {m: uniform(B, T, D, seed=seed + i).requires_grad_() for i, m in enumerate(names)}


def gradients(loss: Tensor, z: dict[str, Tensor]) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, list(z.values())))


def pair(
    names: tuple[str, ...] = NAMES, *, eps: float = 1e-5, counts: float = 1.0
) -> tuple[cmg.CMGQuantizer, mmvq.MultiModalEMAQuantizer]:
    """Both quantizers with the settings of the table, from the same codebook in use.

    The released N is 1 / M of mmvq's, as the release updates M modalities in turn.
    """
    released = cmg.CMGQuantizer(D, L, names, eps=eps).double()
    released.embedding.copy_(uniform(L, D, seed=7))
    released.ema_count.fill_(counts)
    released.ema_weight.copy_(counts * released.embedding)
    quantizer = mmvq.MultiModalEMAQuantizer(
        D,
        L,
        names,
        decay=0.99 ** len(names),
        eps=eps,
        partner="aligned",
        reset_rule="any",
        reset_after=301,
        init="uniform",
        commitment=mmvq.CrossModalCommitmentLoss(beta=2 * BETA),
    ).double()
    book = quantizer.ema_codebook
    book.codes.copy_(released.embedding)
    book.counts.copy_(len(names) * released.ema_count)
    book.sums.copy_(len(names) * released.ema_weight)
    return released, quantizer


@pytest.mark.parametrize("names", PAIRS)
def test_output_of_the_quantizer(names: tuple[str, ...]) -> None:
    """Codes, indices, commitment loss, perplexity and clips of equal code."""
    z = features(names)
    released, quantizer = pair(names)
    book = quantizer.codebook
    theirs, ours = released(z), quantizer(z)
    codes = {m: book[index] for m, index in ours.indices.items()}
    for m in names:
        assert torch.equal(ours.indices[m], theirs.indices[m])
        close(ours.quantized[m], theirs.quantized[m], EXACT)
        own = torch.nn.functional.mse_loss(z[m], codes[m])
        others = [torch.nn.functional.mse_loss(z[m], codes[o]) for o in names if o != m]
        close(theirs.losses[m], 2 * BETA * own + BETA * torch.stack(others).mean(), EXACT)
        counts = torch.bincount(ours.indices[m].flatten(), minlength=L)
        usage = mmvq.functional.code_usage({m: counts})
        close(usage.perplexity[m], perplexity(theirs.indices[m], book), FLOAT32)
    total = torch.stack(list(theirs.losses.values())).sum()
    close(ours.loss, total, EXACT)
    close(gradients(ours.loss, z), gradients(total, z), EXACT)
    modes = torch.stack([index.mode(1).values for index in ours.indices.values()])
    assert torch.equal((modes == modes[0]).all(0).sum(), theirs.equal_num)


def test_loss_of_one_modality() -> None:
    """`audio_embedding_loss` and its like, and `Audio_vq_forward`, which the script never calls."""
    z = features()
    released, quantizer = pair()
    codes = {m: released.infer(x).detach() for m, x in z.items()}
    losses = released(z).losses
    loss = quantizer.commitment
    assert isinstance(loss, mmvq.CrossModalCommitmentLoss)
    terms = loss.terms(z, codes)
    for m in NAMES:
        close(terms[m], losses[m], EXACT)
    audio, names = z["audio"], NAMES[:2]
    own, cross = ((audio - codes[m]).square().mean() for m in names)
    fixed = {"audio": audio, "video": codes["video"]}
    both = mmvq.CrossModalCommitmentLoss(1.0, {("audio", "video"): 0.25})
    close(both(fixed, {m: codes[m] for m in names}), own + 0.25 * cross, EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_one_modality_alone(name: str) -> None:
    """`Audio_vq_embedding` is the quantizer in eval mode on one modality."""
    released, quantizer = pair()
    (x,) = features((name,)).values()
    ours, theirs = quantizer.eval()({name: x}).quantized[name], released.infer(x)
    close(ours, theirs, EXACT)
    close(gradients(ours.square().sum(), {name: x}), 2 * theirs[None], EXACT)
    close(quantizer.decode(quantizer.encode(x)), theirs, EXACT)


@pytest.mark.parametrize("names", PAIRS)
def test_state_after_steps_on_equal_features(names: tuple[str, ...]) -> None:
    """If all modalities have the same features, decay^M and N times M give the released codes.

    Without smoothing, which the release writes back. For unchosen codes N and o decay alike, so
    that e stays.
    """
    released, quantizer = pair(names, eps=0.0)
    book, M = quantizer.ema_codebook, len(names)
    for step in range(5):
        x = uniform(B, T, D, seed=step)
        released(dict.fromkeys(names, x))
        quantizer(dict.fromkeys(names, x))
        close(book.counts, M * released.ema_count, EXACT)
        close(book.sums, M * released.ema_weight, EXACT)
        close(quantizer.codebook, released.embedding, EXACT)


def test_state_after_a_step_on_other_features() -> None:
    """Updates in turn weigh earlier modalities by 0.99 or 0.99^2: a difference of at most 2%."""
    released, quantizer = pair(eps=0.0)
    before = quantizer.codebook
    z = features()
    quantizer(z)
    released(z)
    moved = (quantizer.codebook - before).norm()
    difference = (quantizer.codebook - released.embedding).norm()
    assert 0 < difference < 0.02 * moved


@pytest.mark.parametrize("names", PAIRS)
def test_unactivated_count(names: tuple[str, ...]) -> None:
    """It equals the smallest age over the modalities, here over 100 steps without reset."""
    released, quantizer = pair(names)
    for step in range(100):
        z = {m: uniform(1, 1, D, seed=step % 9 + i) for i, m in enumerate(names)}
        released(z)
        quantizer(z)
        book = quantizer.ema_codebook
        book.codes.copy_(released.embedding)  # so that the same codes are chosen
        used = released.unactivated_count < step
        ages = book.ages.amin(0)
        assert torch.equal(ages[used].double(), released.unactivated_count[used])
    assert 0 < int(used.sum()) < L
    # for a code never chosen the release counts from -1, mmvq from 0
    assert torch.equal(ages[~used].double(), released.unactivated_count[~used] + 1)


def test_reset_after() -> None:
    """A code chosen once is reset at the 301st batch without it, in both."""
    z = {name: torch.ones(1, 1, 1) for name in NAMES[:2]}
    released = cmg.CMGQuantizer(1, 2, NAMES[:2])
    options = {"reset_rule": "any", "reset_after": 301, "init": "uniform"}
    quantizer = mmvq.MultiModalEMAQuantizer(1, 2, NAMES[:2], **options)
    codes = torch.tensor([[1.0], [-50.0]])
    quantizer.set_codes(codes)
    released.embedding.copy_(codes)
    released.ema_count.fill_(1)
    released.ema_weight.copy_(codes)
    for module in (quantizer, released):
        module({name: -50 * x for name, x in z.items()})
    for batch in range(1, 302):
        for module in (quantizer, released):
            module(z)
        for codes in (released.embedding, quantizer.codebook):
            assert (codes.min() > -5) == (batch == 301)


def matching(z: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The released `cmcm_loss`, and that of mmvq on the same codebook."""
    released, _ = pair(tuple(z))
    loss = mmvq.CrossModalCodeMatchingLoss()(z, released.embedding.clone())
    return released(z).matching, loss


@pytest.mark.parametrize(("names", "factor"), [(NAMES[:2], 0.5), (NAMES, 1.5)])
def test_matching_at_chance(names: tuple[str, ...], factor: float) -> None:
    """Equal clips give ln B in mmvq. The release adds 1e-5 to a denominator B."""
    z = dict.fromkeys(names, uniform(1, T, D).expand(B, T, D))
    released, loss = matching(z)
    close(loss, math.log(B), EXACT)
    close(factor * loss, released, factor * 1e-5 / B + EXACT)


def test_matching_has_no_factor() -> None:
    """The released S pairs P_b of the row with P_a of the column, and has the row softmax alone.

    Its constants change a pair's loss by at most 1e-5 / B, and by 2e-10 P'/P for each code.
    """
    z = {m: x.detach() for m, x in features().items()}
    book = pair()[0].embedding.clone()
    released, loss = matching(z)
    assert abs(float(released) - 1.5 * float(loss)) > 1e-4
    p = {m: mmvq.functional.code_probabilities(x, book) for m, x in z.items()}
    every = torch.stack(list(p.values()))
    total = torch.zeros((), dtype=torch.float64)
    for a, b in combinations(NAMES, 2):
        scores = p[a] @ p[b].log().T + p[b] @ p[a].log().T  # mmvq: p[a].log() @ p[b].T
        total = total - 0.5 * scores.log_softmax(1).diagonal().mean()
    close(total, released, 1.5 * (1e-5 / B + 2 * 2e-10 * L * float(every.max() / every.min())))


def cpcs(names: tuple[str, ...]) -> tuple[cmg.CMGCrossCPC, mmvq.CrossCPC]:
    """Both, with the settings of the table and the same parameters."""
    released = cmg.CMGCrossCPC(D, names, num_steps=2).double()
    ours = mmvq.CrossCPC(
        D,
        names,
        num_layers=2,
        num_steps=2,
        min_context=2,
        self_weight=0.1 if len(names) == 2 else 0.05,
        normalize_over="contexts",
    ).double()
    with torch.no_grad():
        for m in names:
            lstm = released.get_submodule(f"{m}_ar_lstm")
            ours.contexts[m].load_state_dict(lstm.state_dict())
            for k in range(2):
                ours.predictors[m][k] = released.get_parameter(f"{m}_predictors.{k}.weight")
    return released, ours


@pytest.mark.parametrize(("names", "factor"), [(NAMES[:2], 2), (NAMES, 6)])
def test_cpc(names: tuple[str, ...], factor: int) -> None:
    """Value and gradient; the released biases cancel, and its start counts from 0."""
    released, ours = cpcs(names)
    z = features(names)
    with pytest.raises(ValueError, match="start"):
        ours(z, start=1)
    for start in range(1, T - 2):
        theirs, loss = released(z, start=start).loss, factor * ours(z, start=start + 1).loss
        close(loss, theirs, EXACT)
        close(gradients(loss, z), gradients(theirs, z), EXACT)


def test_cpc_accuracy_is_of_the_other_axis() -> None:
    """The release takes the argmax over the other axis than its softmax; mmvq cannot."""
    released, ours = cpcs(NAMES)
    z = features(seed=3)
    theirs, mine = released(z, start=2).accuracy, ours(z, start=3).accuracy
    assert {*theirs} == {*mine}
    assert [float(x) for x in theirs.values()] != [float(mine[key]) for key in theirs]


class Clubs(nn.Module):
    """Both estimators with the released network of q, which has three hidden layers."""

    def __init__(self, negatives: Literal["all", "shuffled"]) -> None:
        super().__init__()
        self.released = cmg.CMGCLUB(D, 3, hidden_dim=8)
        self.ours = mmvq.CLUBEstimator(D, 3, 8, negatives=negatives, logvar_bound=1.0)
        self.ours.p_mu = nn.Sequential(*three_hidden_layers(D, 8, 3))
        self.ours.p_logvar = nn.Sequential(*three_hidden_layers(D, 8, 3))
        for name in ("p_mu", "p_logvar"):
            state = self.released.get_submodule(name).state_dict()
            self.ours.get_submodule(name).load_state_dict(state)
        self.double()


def test_club_likelihood() -> None:
    """`-loglikeli` is `learning_loss` minus the constant ln(2 pi) / 2 per dimension of y."""
    clubs = Clubs("shuffled")
    x, y = uniform(B, T, D), uniform(B, T, 3, seed=1)
    constant = 3 * math.log(2 * math.pi) / 2
    close(clubs.ours.learning_loss(x, y) - constant, -clubs.released.log_likelihood(x, y), EXACT)


def test_club_estimate() -> None:
    """`mi_est` with the same permutation: equal for T = 1, or for a variance constant over T."""
    clubs = Clubs("shuffled")
    x, y = uniform(B, T, D).requires_grad_(), uniform(B, T, 3, seed=1).requires_grad_()

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        draws = (torch.Generator().manual_seed(2) for _ in range(2))
        return clubs.ours(x, y, generator=next(draws)), clubs.released(x, y, generator=next(draws))

    ours, theirs = both(x[:, :1], y[:, :1])
    close(ours, theirs, EXACT)
    ours, theirs = both(x, y)
    # released: the mean of the squares over exp of the mean log-variance
    assert float((ours - theirs).detach().abs()) > 1e-6
    with torch.no_grad():
        for net in (clubs.ours.p_logvar, clubs.released.p_logvar):
            net.get_parameter("6.weight").zero_()
    ours, theirs = both(x, y)
    close(ours, theirs, EXACT)
    z = {"x": x}
    close(gradients(ours, z), gradients(theirs, z), EXACT)


def test_club_over_all_pairs_is_the_mean_over_permutations() -> None:
    clubs = Clubs("all")
    x, y = uniform(B, 1, D), uniform(B, 1, 3, seed=1)
    orders = [torch.tensor(order) for order in permutations(range(B))]
    mean = torch.stack([clubs.released(x, y, permutation=order) for order in orders]).mean()
    close(clubs.ours(x, y), mean, EXACT)
