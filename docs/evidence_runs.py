"""What was run: a line a study, from its own results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evidence_data import EXAMPLES, markdown, read
from evidence_plane import STUDIES, regime_folders
from evidence_recipes import results

HEADER = ("study", "teacher, student", "models trained", "seeds", "hours of training", "torch, transformers")
README = "../examples/self_evolution/README.md"
Line = list[str]


def line(name: str, sizes: Iterable[float], found: dict[str, Any], seeds: Iterable[int], seconds: list[float]) -> Line:
    """``sizes`` in parameters; ``seconds`` of each training."""
    versions = ", ".join(found["versions"][package] for package in ("torch", "transformers"))
    told = ", ".join(f"{size / 1e6:.3g}M" for size in sizes)
    each = ", ".join(map(str, sorted(set(seeds))))
    return [name, told, str(len(seconds)), each, f"{sum(seconds) / 3600:.1f}", versions]


def demo() -> Line:
    found = read(EXAMPLES / "results/demo/results.json")
    stages = [run["stages"] for run in found["runs"]]
    sizes = (stages[0][who]["parameters"] for who in ("teacher", "student"))
    seeds, seconds = (
        (run["seed"] for run in found["runs"]),
        [each["seconds"] for run in stages for each in run.values()],
    )
    return line(f"[demo]({README}#distillpy-the-toy-corpus)", sizes, found, seeds, seconds)


def strengths() -> Line:
    runs = [read(path) for path in sorted((EXAMPLES / "results/strengths").glob("*.json"))]
    stages = [run["stages"] for run in runs]
    sizes = (stages[0][who]["parameters"] for who in ("teacher", "student"))
    seconds = [each["seconds"] for run in stages for name, each in run.items() if name != "teacher"]
    return line("students of several strengths", sizes, runs[0], [0], [*seconds, stages[0]["teacher"]["seconds"]])


def regimes(folder: Path) -> Line:
    found = read(folder / "results.json")
    sizes = {each["strength"]: each["parameters"] for each in found["starts"]}
    seconds = [each["seconds"] for each in (*found["starts"], *found["runs"])]
    name = f"[the plane]({README}#regimes-where-each-method-is-best), {STUDIES.get(folder.name, folder.name)}"
    seeds = (run["seed"] for run in found["runs"])
    about = (sizes["teacher"], min(sizes.values()))
    return line(name, about, found["about"], seeds, seconds)


def table1() -> Line:
    found = read(EXAMPLES / "self_evolution/results/table1/results.json")
    sizes = (found["pretraining"][who]["parameters"] for who in ("teacher", "student"))
    seconds = [each["seconds"] for each in (*found["pretraining"].values(), *found["runs"])]
    name = f"[Self-Evolution's table]({README}#table-1-in-miniature-multi30k-four-directions)"
    return line(name, sizes, found, found["settings"]["seeds"], seconds)


def smollm2(study: str) -> Line:
    found = read(EXAMPLES / f"smollm2/results/{study}/results.json")
    student = next(iter(found["students"].values()))
    seconds = [student["seconds"], *(run["seconds"] for run in found["runs"])]
    name = f"[SmolLM2](../examples/smollm2/README.md), {study}"
    return line(name, (134_515_008, student["parameters"]), found, (run["seed"] for run in found["runs"]), seconds)


def recipe(name: str, page: str, path: Path) -> Line:
    """Of a recipe's metrics.json: what it has of these; sizes are in its README."""
    found = read(path)
    if "arms" in found:
        seeds = found["arms"]["sdrrl"]["seeds"]
    else:
        seeds = found["seeds"] if "seeds" in found else {row["seed"] for row in found["scores"]}
    told = ", ".join(map(str, sorted(map(int, seeds))))
    versions = found.get("versions", {})
    return [
        f"[{name}](../examples/{page})",
        "",
        "",
        told,
        "",
        ", ".join(versions.get(key, "") for key in ("torch", "transformers")),
    ]


def recipes() -> list[Line]:
    folders = {
        "cycle_distill": ("CycleDistill", "cycle_distill/README.md#what-was-run"),
        "sdrrl": ("SDRRL", "sdrrl/README.md#results"),
        "mt_llm": ("MT-LLM", "mt_llm/README.md#results"),
    }
    return [
        recipe(f"{title}{', ' + name if name else ''}", page, path)
        for folder, (title, page) in folders.items()
        for name, path in results(folder).items()
    ]


FIXED: tuple[Callable[[], Line], ...] = (
    demo,
    strengths,
    table1,
    lambda: smollm2("near"),
    lambda: smollm2("cpu"),
)


def table() -> str:
    planes = [regimes(folder) for folder in regime_folders()]
    return markdown(HEADER, [*planes, *(study() for study in FIXED), *recipes()])
