"""One seed's numbers: every system's accuracy in every language, and retrieval before and after stage 1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_kd.training.data.reading import sound
from fused_kd.training.data.sources import file_rows
from fused_kd.training.mt_llm.evaluation import accuracies, retrieval_at_1
from fused_kd.training.mt_llm.fitting import TRAINED
from fused_kd.training.mt_llm.materials import Materials
from fused_kd.training.mt_llm.stacked import WEIGHTS, Embedder, load_trained
from fused_kd.training.runs import read_lines, write_lines

BEFORE = "before"


def classify(
    materials: Materials, seed: int, folders: Mapping[str, Path], translations: Path, out: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """``{system: {language: accuracies}}``; ``predictions.jsonl`` in ``out`` has the classes themselves.

    Args:
        folders: of the seed's trainings: "task", "distil-ARM", perhaps "encoder-frozen", "encoder-tuned".
        translations: folder with ``LANGUAGE.txt``, the tests in English.
    """
    c, classes = materials.config, materials.classes
    everyone = ["en", *c.languages]
    task = materials.classifier(seed, folders["task"]).eval()
    translated = {name: read_lines(translations / f"{name}.txt") for name in c.languages}
    found = {
        "LLM alone": _predict(materials, task, "llm", everyone),
        "translate-test": _predict(materials, task, "llm", c.languages, translated),
    }
    for name in [name for name in folders if name.startswith("encoder-")]:
        model = materials.encoder_classifier(seed, name == "encoder-tuned", folders[name]).eval()
        found[f"MT {name.replace('-', ', ')}"] = _predict(materials, model, "mt", everyone)
    head = task.head.weight.detach().cpu()
    del task
    for name, arm in c.ways.items():
        module = materials.distillation(materials.stacked(seed), head, arm)
        load_trained(module, folders[f"distil-{name}"] / TRAINED)
        found[f"MT-LLM, {name}"] = _predict(materials, module.eval(), "mt", everyone)
    labels = {name: [classes.index(label) for label in materials.items(f"test.{name}")[1]] for name in everyone}
    lines = (
        json.dumps({"system": system, "language": name, "labels": [classes[index] for index in predicted]})
        for system, by_language in found.items()
        for name, predicted in by_language.items()
    )
    write_lines(out / "predictions.jsonl", lines)
    return {
        system: {name: accuracies(predicted, labels[name]) for name, predicted in by_language.items()}
        for system, by_language in found.items()
    }


def _predict(
    materials: Materials,
    model: Any,
    kind: str,
    languages: Sequence[str],
    english: Mapping[str, list[str]] | None = None,
) -> dict[str, list[int]]:
    """Of each language's test, or of its translations into ``english``."""
    found = {}
    for name in languages:
        texts, spoken = (materials.items(f"test.{name}")[0], name) if english is None else (english[name], "en")
        found[name] = materials.embed(model.logits, kind, texts, spoken).argmax(1).tolist()
    return found


def retrieve(materials: Materials, seed: int, adapted: Path) -> dict[str, dict[str, float]]:
    """``{system: {language: retrieval@1}}``: sentences whose English one is the nearest; empty without parallel rows.

    The stacked model's sentences are looked for among the plain LLM's English ones, those of the LLM and of the encoder
    alone among their own. ``adapted`` is the folder of stage 1, with the weights it began with in ``before``.
    """
    path = materials.task / "retrieval.jsonl"
    if not path.is_file():
        return {}
    rows = [row.value for row in sound(file_rows(path, None))]
    texts = {name: [row[name] for row in rows] for name in ("en", *materials.config.languages)}
    found: dict[str, dict[str, float]] = {}
    for title, folder in (("before stage 1", adapted / BEFORE), ("after stage 1", adapted)):
        model = materials.stacked(seed, folder / WEIGHTS).eval()
        english = materials.embed(model.plain, "llm", texts["en"], "en")
        found[title] = {
            name: retrieval_at_1(materials.embed(model, "mt", given, name), english) for name, given in texts.items()
        }
    for title, function, kind in (
        ("LLM alone", model.plain, "llm"),
        ("MT encoder alone", Embedder(model.encoder).eval(), "mt"),
    ):
        english = materials.embed(function, kind, texts["en"], "en")
        found[title] = {
            name: retrieval_at_1(materials.embed(function, kind, texts[name], name), english)
            for name in materials.config.languages
        }
    return found
