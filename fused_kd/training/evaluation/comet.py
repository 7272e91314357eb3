"""COMET, a learned metric of translation quality, where its package and model are at hand.

The package asks for transformers < 5 and the rest of this library's training code for transformers >= 5: until
that changes, COMET lives in an environment of its own, whose interpreter scores the texts for this one. It
runs this very file, which therefore needs the standard library alone.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MODEL = "Unbabel/wmt22-comet-da"
# a script's folder is searched for modules first, and the files of this one are called comet, data, ...
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_ERRORS = {"ImportError": ImportError, "ValueError": ValueError}


@dataclass(frozen=True)
class CometScores:
    """COMET of a system: the mean of its segments' scores, those scores in their order, and the model's name.

    Higher is better; `MODEL` gives about 0-1. Scores of different models are not comparable.
    """

    system: float
    segments: tuple[float, ...]
    model: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def comet_scores(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    model: str = MODEL,
    batch_size: int = 16,
    gpus: int | None = None,
    python: str | Path | None = None,
    progress: bool = False,
) -> CometScores:
    """COMET of translations, given their sources and references.

    Args:
        sources, hypotheses, references: one text a sentence, in the same order.
        model: a hub name; default ``"Unbabel/wmt22-comet-da"`` (2.3 GB, fetched once). Or a folder or
            ``.ckpt`` file that was fetched before. Some other models ask for a licence to be accepted on the
            hub, and for a login. The package itself loads the ``.ckpt`` file, there where it is installed; such a
            file may be a pickle, which can hold code that runs: only models that you trust.
        batch_size: sentences a batch.
        gpus: 0 (CPU) or 1; None (default) takes one where there is one.
        python: interpreter of an environment with the package, such as ``"comet-env/bin/python"``; None
            (default) is this process. Whatever program it names is started.
        progress: show COMET's progress bar.

    Raises:
        ImportError: the package is not installed there. ValueError: the model cannot be loaded; lists that
            are empty or of different length; a size out of range. TypeError: an argument of the wrong type.
        RuntimeError: the other interpreter ended without a result.
    """
    from fused_kd.training.evaluation.evaluate import check_texts

    check_texts({"sources": sources, "hypotheses": hypotheses, "references": references})
    for name, value, low, high in (("batch_size", batch_size, 1, None), ("gpus", gpus, 0, 1)):
        if value is None and name == "gpus":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name}={value}: expected at least {low}{'' if high is None else f', at most {high}'}")
    if not isinstance(model, str):
        raise TypeError(f"model must be a string, got {model!r}")
    if gpus is None:
        import torch

        gpus = int(torch.cuda.is_available())
    request: dict[str, Any] = {
        "samples": [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ],
        "model": model,
        "batch_size": batch_size,
        "gpus": gpus,
        "progress": progress,
    }
    answer = _predict(**request) if python is None else _predict_elsewhere(python, request)
    return CometScores(answer["system"], tuple(answer["segments"]), model)


def _predict(samples: list[dict[str, str]], model: str, batch_size: int, gpus: int, progress: bool) -> dict[str, Any]:
    # gpus > 1 would start the calling script once more for each GPU
    output = _load(model).predict(samples, batch_size=batch_size, gpus=gpus, progress_bar=progress)
    return {"system": float(output.system_score), "segments": [float(value) for value in output.scores]}


@lru_cache(maxsize=1)
def _load(model: str) -> Any:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError as error:
        raise ImportError(
            "COMET needs the package unbabel-comet: pip install 'fused_kd[comet]' in an environment of its own "
            "(it asks for transformers < 5), and give that environment's interpreter as python=..."
        ) from error
    finally:
        # the package turns on everybody's INFO messages
        root.setLevel(level)
        root.handlers[:] = handlers
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            checkpoint = str(path / "checkpoints" / "model.ckpt")
        elif path.is_file():
            checkpoint = str(path)
        else:
            checkpoint = download_model(model)
        return load_from_checkpoint(checkpoint)
    except Exception as error:
        raise ValueError(
            f"model={model!r} cannot be loaded ({type(error).__name__}: {error}): expected a COMET model that the "
            "Hugging Face hub gives (online or in its cache; with its licence accepted and a login, where it has "
            "one), a folder with checkpoints/model.ckpt, or a .ckpt file"
        ) from error


def _predict_elsewhere(python: str | Path, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        try:
            # what it prints goes to stderr: this process may be writing a table
            command = [str(python), "-c", _START, __file__, str(question), str(reply)]
            code = subprocess.run(command, stdout=2, check=False).returncode
        except OSError as error:
            raise ValueError(f"python={str(python)!r} cannot be started: {error}") from error
        if not reply.is_file():
            raise RuntimeError(f"{python} ended with exit status {code} and no scores; its messages are above")
        answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    if "error" in answer:
        raise _ERRORS[answer["error"]](f"{python}: {answer['message']}")
    return answer


def _main(question: str, reply: str) -> None:
    request = json.loads(Path(question).read_text(encoding="utf-8"))
    try:
        answer = _predict(**request)
    except (ImportError, ValueError) as error:
        kind = "ImportError" if isinstance(error, ImportError) else "ValueError"
        answer = {"error": kind, "message": str(error)}
    Path(reply).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[2:])
