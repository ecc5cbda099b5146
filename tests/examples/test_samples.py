"""The short scripts of the examples, each run as a reader would run it."""

from __future__ import annotations

import itertools
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import cmg_pretrain
import pytest
import torch

EXAMPLES = Path(cmg_pretrain.__file__).parent


def run(name: str) -> dict[str, Any]:
    """The names a script leaves."""
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("02_autoencoder.py", "sklearn"),
        ("03_lightning.py", "lightning"),
        ("04_hugging_face.py", "transformers"),
        ("05_tokens.py", "datasets"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback ends with the line of the import, and its comment says what to do."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.datasets", raising=False)
    with pytest.raises(ModuleNotFoundError) as error:
        run(name)
    assert "pip install 'mmvq[samples]'" in "".join(traceback.format_exception(error.value)[-2:])


def test_two_modalities_of_a_segment_have_one_code(capsys: pytest.CaptureFixture[str]) -> None:
    left = run("01_two_modalities.py")
    assert left["agreement"] > 0.8  # chance is about 1/12
    assert left["quantizer"].usage().shared.all()
    codes, tokens = left["codes"], left["tokens"]["video"]
    assert torch.equal(codes, left["quantizer"].codebook[tokens])
    assert f"{left['agreement']:.0%} of new segments" in capsys.readouterr().out


def test_an_autoencoder_learns_to_draw_from_tokens() -> None:
    left = run("02_autoencoder.py")
    assert left["losses"][-1] < left["losses"][0] / 2
    assert left["error"] < left["baseline"] / 2  # the baseline is the mean picture
    assert left["tokens"].shape == (297, 4)
    torch.testing.assert_close(left["from_tokens"], left["reconstruction"])


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # lightning's, against torch 2.13
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_logs_what_the_monitor_reads() -> None:
    left = run("03_lightning.py")
    history, logged = left["model"].monitor.history, left["trainer"].callback_metrics
    assert history["step"] == list(range(20, 161, 20))  # 5 epochs of 32 batches
    for name in history.keys() - {"step"}:
        assert logged[name].item() == history[name][-1], name
    assert history["agreement/audio-video"][-1] > 3 / 12  # chance is one of twelve events
    assert logged["accuracy/audio-video"] > 3 / 32  # chance is one in a batch of 32


def test_hugging_face_modules_come_back_from_a_folder() -> None:
    left = run("04_hugging_face.py")
    assert torch.equal(left["tokens"], left["again"])
    assert torch.equal(left["tokens"] == -1, ~left["valid"])
    assert (~left["valid"]).any()
    assert left["used"] > 8  # there are eight notes
    assert left["loaded"] is not left["quantizer"]


def test_tokens_survive_the_file() -> None:
    left = run("05_tokens.py")
    for name, tokens in left["tokens"].items():
        assert torch.equal(left["padded"][name], tokens)
        assert (tokens == -1).any()
        assert (left["codes"][name][tokens == -1] == 0).all()
        assert torch.equal(
            left["codes"][name][tokens >= 0], left["quantizer"].codebook[tokens[tokens >= 0]]
        )
    for clip, sentence in zip(left["corpus"], left["sentences"], strict=True):
        middle = sentence.index(left["MARKER"]["video"])
        assert sentence[0] == left["MARKER"]["audio"]
        assert sentence[1:middle] == clip["audio"]
        assert sentence[middle + 1 : -1] == clip["video"]
        assert max(sentence) == sentence[-1] == left["END"]


def test_k_means_is_that_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    left = run("06_kmeans.py")
    assert all(a >= b for a, b in itertools.pairwise(left["inertia"]))
    reference = KMeans(left["K"], init=left["start"].numpy(), n_init=1, tol=0, max_iter=1000)
    reference.fit(left["x"].numpy())
    assert left["inertia"][-1] == pytest.approx(reference.inertia_, rel=1e-5)
    assert (left["nearest"].numpy() == reference.labels_).all()
