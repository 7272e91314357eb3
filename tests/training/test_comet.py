"""COMET through a stand-in for the package's interface (unbabel-comet 2.2), and what its absence says."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from fused_kd.training.evaluation import comet
from fused_kd.training.evaluation.comet import CometScores, comet_scores

# What the package does: INFO messages on at import; a KeyError for every failed download; scores in the order of the
# samples, as floats, in an object with attributes; lines on standard output.
PACKAGE = """
import logging
from types import SimpleNamespace
logging.basicConfig(level=logging.INFO)
logging.getLogger().setLevel(logging.INFO)

def download_model(model, saving_directory=None, local_files_only=False):
    if model != "Unbabel/wmt22-comet-da":
        raise KeyError(f"Model '{model}' not supported by COMET.")
    return "/cache/checkpoints/model.ckpt"

def load_from_checkpoint(checkpoint_path, reload_hparams=False, strict=False, local_files_only=False):
    if not checkpoint_path.endswith("model.ckpt"):
        raise Exception(f"Invalid checkpoint path: {checkpoint_path}")
    loads.append(checkpoint_path)
    return Model()

loads, calls = [], []

class Model:
    def predict(self, samples, batch_size=16, gpus=1, devices=None, mc_dropout=0, progress_bar=True,
                accelerator="auto", num_workers=None, length_batching=True):
        print("GPU available: False")
        calls.append((batch_size, gpus, progress_bar))
        scores = [len(s["mt"]) / (len(s["src"]) + 100 * len(s["ref"])) for s in samples]
        return SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))
"""
TEXTS = {"sources": ["abcd", "ab"], "hypotheses": ["x", "xyz"], "references": ["u", "vw"]}
SEGMENTS = (1 / 104, 3 / 202)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    comet._load.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-in, on the path of this process and of those that it starts."""
    folder = tmp_path / "site"
    (folder / "comet").mkdir(parents=True)
    (folder / "comet" / "__init__.py").write_text(PACKAGE)
    monkeypatch.delitem(sys.modules, "comet", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("comet", None)


@pytest.mark.parametrize("python", [None, sys.executable])
def test_scores_come_back_in_order(package: Path, python: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger().level
    made = comet_scores(**TEXTS, batch_size=3, gpus=0, python=python)
    assert made.segments == pytest.approx(SEGMENTS) and made.system == pytest.approx(sum(SEGMENTS) / 2)
    assert made.model == "Unbabel/wmt22-comet-da" and made.as_dict()["segments"] == made.segments
    assert all(type(value) is float for value in (made.system, *made.segments))
    assert logging.getLogger().level == level
    assert made == CometScores(made.system, made.segments, made.model)


def test_the_model_is_loaded_once_and_called_as_asked(package: Path, tmp_path: Path) -> None:
    for progress in (False, True):
        comet_scores(**TEXTS, batch_size=3, gpus=1, progress=progress)
    stand_in = sys.modules["comet"]
    assert stand_in.loads == ["/cache/checkpoints/model.ckpt"]
    assert stand_in.calls == [(3, 1, False), (3, 1, True)]
    # a folder and a file that were fetched before need no hub
    file = tmp_path / "model" / "checkpoints" / "model.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    for model in (file, file.parents[1]):
        assert comet_scores(**TEXTS, gpus=0, model=str(model)).model == str(model)
    assert stand_in.loads[1:] == [str(file)] * 2


@pytest.mark.parametrize("python", [None, sys.executable])
def test_a_model_that_cannot_be_loaded(package: Path, python: str | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='Unbabel/XCOMET-XL' cannot be loaded \(KeyError.*licence accepted"):
        comet_scores(**TEXTS, model="Unbabel/XCOMET-XL", gpus=0, python=python)
    other = tmp_path / "weights.bin"
    other.touch()
    with pytest.raises(ValueError, match="Invalid checkpoint path"):
        comet_scores(**TEXTS, model=str(other), gpus=0, python=python)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(ImportError, match=r"pip install 'fused_kd\[comet\]' in an environment of its own"):
        comet_scores(**TEXTS, gpus=0)
    # another package of that name
    (tmp_path / "comet.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"python.*fused_kd\[comet\]"):
        comet_scores(**TEXTS, gpus=0, python=sys.executable)


def test_an_interpreter_that_fails(package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"python='.*none' cannot be started"):
        comet_scores(**TEXTS, gpus=0, python=tmp_path / "none")
    text = (package / "comet" / "__init__.py").read_text()
    (package / "comet" / "__init__.py").write_text(text.replace("print(", "raise SystemError("))
    with pytest.raises(RuntimeError, match="ended with exit status"):
        comet_scores(**TEXTS, gpus=0, python=sys.executable)


def test_output_of_the_other_interpreter_leaves_standard_output_alone(package: Path, capfd) -> None:
    comet_scores(**TEXTS, gpus=0, python=sys.executable)
    out, err = capfd.readouterr()
    assert out == "" and "GPU available" in err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": ["a"]}, ValueError, "1 sources for 2 hypotheses for 2 references"),
        ({"references": "ab"}, TypeError, "references must be a list"),
        ({"sources": [], "hypotheses": [], "references": []}, ValueError, "are empty"),
        ({"batch_size": 0}, ValueError, "batch_size=0: expected at least 1"),
        ({"gpus": 2}, ValueError, "gpus=2: expected at least 0, at most 1"),
        ({"gpus": 0.5}, TypeError, "gpus must be an int"),
        ({"model": None}, TypeError, "model must be a string"),
    ],
)
def test_bad_arguments_before_any_import(
    monkeypatch: pytest.MonkeyPatch, changes: dict, error: type[Exception], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(error, match=message):
        comet_scores(**{**TEXTS, **changes})
