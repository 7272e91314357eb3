"""What a run of SDRRL has found: tables, paired comparisons of arms, figures, from the small files of its pieces.

python examples/sdrrl/sdrrl_report.py RESULTS   # a run's results, finished or not; writes metrics.json and figures
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fused_kd.training.score import bootstrap_by_class
from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, told, write_json

BEFORE = "before"
METRICS = ("accuracy", "chrf", "bleu")
_PIECE = re.compile(r"(?P<step>collect|filter|set|train|dev|test)-(?P<name>.+?)(?:-s(?P<seed>\d+))?")


def gather(results: str | Path, titles: Iterable[str] | None = None) -> dict[str, Any]:
    """Of a run's ``pieces.jsonl``: counts of every step; of each arm and seed its rows, its training, and its scores.

    Args:
        results: a run's folder of results.
        titles: the pieces that count; None: all that there are, of a run that may be unfinished.
    """
    pieces = told(Path(results) / "pieces.jsonl")
    found: dict[str, Any] = {"tasks": {}, "transfer": {}, "sets": {}, "training": {}, "translator": None, "scores": []}
    for title in pieces if titles is None else [title for title in titles if title in pieces]:
        piece = pieces[title]
        known = _PIECE.fullmatch(title)
        if title == "about":
            found = {**piece, **found}
        elif title == "tasks":
            found["tasks"] = piece["counts"]
        elif title == "translator-test":
            found["translator"] = piece["scores"]
        elif known is None:  # what an arm is trained from: base models, translator
            found["training"] |= {title: piece["training"]} if "training" in piece else {}
        elif known["step"] in ("collect", "filter"):
            found["transfer"].setdefault(title.partition("-")[2], {}).update(piece["counts"])
        elif known["step"] in ("dev", "test"):
            row = {"arm": known["name"], "seed": int(known["seed"] or 0), "tasks": known["step"]}
            found["scores"] += [row | {"language": key, **values} for key, values in piece["scores"].items()]
        else:
            what = {"set": ("sets", "counts"), "train": ("training", "training")}[known["step"]]
            found[what[0]][title.partition("-")[2]] = piece[what[1]]
    return found


def scored(metrics: Mapping[str, Any], tasks: str | None = None) -> list[dict[str, Any]]:
    """The scores of the tasks "dev" or "test"; None: of the test where it was scored, else of dev."""
    found = {
        which: [row for row in metrics["scores"] if row.get("tasks", "test") == which] for which in ("test", "dev")
    }
    return found[tasks] if tasks else found["test"] or found["dev"]


def chosen(metrics: Mapping[str, Any], target: str) -> dict[str, str]:
    """Of arms ``NAME-SETTING`` the setting of each ``NAME`` with the best accuracy in the target language on dev.

    Accuracies are means over the seeds that all settings of a name have (of all, where they share none). Without dev
    scores all arms stay: ``{NAME or arm: arm}``.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in scored(metrics, "dev"):
        if row["language"] == target and row["accuracy"] is not None:
            settings = found.setdefault(row["arm"].partition("-")[0], {})
            settings.setdefault(row["arm"], {})[row["seed"]] = row["accuracy"]
    if not found:
        return {arm: arm for arm in dict.fromkeys(row["arm"] for row in metrics["scores"])}
    first = (BEFORE, "sdrrl", "translate_sft")
    names = [name for name in first if name in found] + [name for name in found if name not in first]

    def best(settings: Mapping[str, Mapping[int, float]]) -> str:
        shared = set.intersection(*(set(seeds) for seeds in settings.values()))
        return max(settings, key=lambda arm: float(np.mean([settings[arm][s] for s in shared or settings[arm]])))

    return {name: best(found[name]) for name in names}


def of_chosen(metrics: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The metrics with the test scores of the chosen settings alone, under their arms' names."""
    names = {arm: name for name, arm in chosen(metrics, target).items()}
    order = list(names)
    rows = sorted((row for row in scored(metrics) if row["arm"] in names), key=lambda row: order.index(row["arm"]))
    sets = {}
    for title, counts in metrics["sets"].items():
        arm, _, seed = title.rpartition("-s")
        sets |= {f"{names[arm]}-s{seed}": counts} if arm in names else {}
    return {**metrics, "scores": [{**row, "arm": names[row["arm"]]} for row in rows], "sets": sets}


def transfer_table(metrics: Mapping[str, Any]) -> str:
    """What became of the answers, as Markdown."""
    import pandas

    return str(pandas.DataFrame(metrics["transfer"]).T.to_markdown())


def results_table(metrics: Mapping[str, Any]) -> str:
    """Every arm's scores in both languages, mean over seeds ± their deviation, as Markdown."""
    import pandas

    def shown(values: pandas.Series) -> str:
        values = values.dropna()
        deviation = f" ±{values.std():.1f}" if len(values) > 1 else ""
        return f"{values.mean():.1f}{deviation}" if len(values) else "-"

    frame = pandas.DataFrame(scored(metrics))
    table = frame.groupby(["arm", "language"])[list(METRICS)].agg(shown).unstack("language").reindex(frame.arm.unique())
    table.columns = [f"{language} {metric}" for metric, language in table.columns]
    rows = {title.rpartition("-s")[0]: counts["rows"] for title, counts in metrics["sets"].items()}
    table.insert(0, "rows", [rows.get(arm, "-") for arm in table.index])
    return str(table.to_markdown(disable_numparse=True))


def paired(
    scores: Sequence[Mapping[str, Any]], first: str, second: str, language: str, seed: int = 0
) -> dict[str, Any] | None:
    """How much more accurate one arm is than another, in points, on the same questions.

    Args:
        scores: a run's ``scores``.
        first, second: arms.

    Returns:
        ``difference``, the mean over the seeds that both have; ``low`` and ``high``, 95 % of it over questions drawn
        again within their kinds, 10,000 times, the same ones for every seed; ``by_seed``. None where they share none.
    """
    hits: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for row in scores:
        if row["language"] == language and row["arm"] in (first, second) and row.get("hits"):
            hits[row["arm"], row["seed"]] = {kind: np.array(list(text), int) for kind, text in row["hits"].items()}
    seeds = sorted({seed for arm, seed in hits if arm == first} & {seed for arm, seed in hits if arm == second})
    if not seeds:
        return None
    kinds = hits[first, seeds[0]]
    apart = {kind: np.stack([hits[first, s][kind] - hits[second, s][kind] for s in seeds]) for kind in kinds}
    return bootstrap_by_class(apart, seeds, seed=seed)


def comparisons(metrics: Mapping[str, Any], recipe: str = "sdrrl", baseline: str = "translate_sft") -> dict[str, Any]:
    """:func:`paired` of the recipe with every other arm, and of ``RECIPE_X`` with ``BASELINE_X``.

    Returns:
        ``{"FIRST SECOND LANGUAGE": ...}``.
    """
    rows = scored(metrics)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    variants = {arm: arm.replace(recipe, baseline, 1) for arm in arms if arm.startswith(f"{recipe}_")}
    twins = {*variants, *variants.values()}
    asked = [(recipe, arm) for arm in arms if arm != recipe and arm not in twins] + list(variants.items())
    made = {
        f"{first} {second} {language}": paired(rows, first, second, language)
        for first, second in asked
        for language in dict.fromkeys(row["language"] for row in rows)
    }
    return {name: value for name, value in made.items() if value is not None}


def comparisons_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| arm | against | language | points | 95 % | seeds |", "|---|---|---|---|---|---|"]
    for name, value in found.items():
        first, second, language = name.split()
        seeds = " ".join(f"{points:+.1f}" for points in value["by_seed"].values())
        lines.append(
            f"| `{first}` | `{second}` | {language} | {value['difference']:+.1f} | "
            f"{value['low']:+.1f} to {value['high']:+.1f} | {seeds} |"
        )
    return "\n".join(lines)


def write_plots(metrics: Mapping[str, Any], folder: str | Path) -> None:
    """``accuracy.png`` and ``chrf.png`` (means, with the deviation over seeds)."""
    import matplotlib
    import pandas

    matplotlib.use("Agg")
    frame = pandas.DataFrame(scored(metrics), columns=["arm", "language", "majority", *METRICS])
    for key, label in (("accuracy", "accuracy of questions (%)"), ("chrf", "chrF of completions")):
        if frame[key].notna().any():
            numbers = frame.groupby(["arm", "language"])[key].agg(["mean", "std"]).unstack("language")
            numbers = numbers.reindex(frame.arm.unique()[::-1])
            size = 7.5, 1 + len(numbers) / 2
            axis = numbers["mean"].plot.barh(xerr=numbers["std"], xlabel=label, ylabel="", figsize=size)
            if key == "accuracy":
                axis.axvline(frame.majority.mean(), color="gray", linestyle="--", label="commonest answers")
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
            axis.figure.savefig(Path(folder) / f"{key}.png", dpi=130, bbox_inches="tight")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="folders of results of one study, such as of several seeds")
    parser.add_argument("--output", help="of metrics.json and figures; default: the first folder")
    parser.add_argument("--target", default="de", help="the language whose dev accuracy chooses settings")
    given = parser.parse_args(argv)
    metrics: dict[str, Any] = {}
    for results in given.results:
        whole = read_json(Path(results) / "metrics.json")
        known = gather(results) if whole is None else whole
        if not metrics:
            metrics = dict(known)
            continue
        metrics["scores"] = [*metrics["scores"], *known["scores"]]
        for key in ("sets", "training", "transfer"):
            metrics[key] = {**known[key], **metrics[key]}
    best = of_chosen(metrics, given.target)
    taken = chosen(metrics, given.target)
    best["scores"] += [row for row in scored(metrics) if row["arm"] not in taken.values()]
    metrics |= {"chosen": taken, "comparisons": comparisons(best)}
    folder = Path(given.output or given.results[0])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    write_plots(best, folder)
    tables = [
        transfer_table(metrics),
        results_table({**metrics, "scores": scored(metrics, "dev") or metrics["scores"]}),
    ]
    tables += [results_table(best), comparisons_table(metrics["comparisons"])]
    print(*tables, sep="\n\n")
    return metrics


if __name__ == "__main__":
    run_script(main)
