"""What a run of distill.py came to: its table, one sentence, plots; and a small report of several runs.

    python examples/distill_report.py RUN [RUN ...] --output FOLDER

reads metrics.json of the folders RUN, such as those of three seeds, and writes results.json, results.md and, where they
differ in their seeds alone, bleu.png.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fused_kd.training.data import Pair
from fused_kd.training.score import ALPHA, paired_bootstrap
from fused_kd.training.script import run_script
from fused_kd.training.stage import read_json, write_bytes, write_json, write_text

PRETRAINED = ("teacher", "student")
# what distilled students are compared with, and what the tables call it
BASELINES = {"student": "the start", "sft": "SFT", "forward_kd": "ForwardKD"}
ON_SCREEN = ("student", "sft")
CURVES = {"loss": "loss, nats a token", "hard_fraction": "share of hard tokens", "difficulty": "mean difficulty, nats"}
LEAST_BLEU = 1.5  # students below it do not translate, and differ in nothing that counts
LEAST_SENTENCES = 100  # of a test, to claim anything
NOT_TOLD = ("seed", "jobs", "only", "preset", "objective")  # what a group of runs may differ in
KEPT = ("scores", "against", "parameters", "rows", "steps", "seconds")


def compare(made: Mapping[str, Sequence[str]], test: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Each distilled stage -> baseline -> metric -> ``delta`` and ``p``, by paired bootstrap over the test sentences.

    Args:
        made: stage -> hypotheses, the baselines among them.
        test: the pairs that were translated.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in made if name not in PRETRAINED}
    references = [pair.target for pair in test]
    for baseline in BASELINES:
        later = [name for name in found if name != "sft" or baseline == "student"]
        systems = {name: made[name] for name in (baseline, *later) if name in made}
        if baseline not in made or len(systems) < 2:
            continue
        for test_of in paired_bootstrap(systems, references, baseline):
            result = {"delta": test_of.delta, "p": test_of.p_value}
            found[test_of.system].setdefault(baseline, {})[test_of.metric] = result
    return found


def table(metrics: Mapping[str, Any]) -> str:
    """A row a stage, the best distilled student in bold, and what the numbers are, as Markdown."""
    stages, distilled = metrics["stages"], distilled_of(metrics)
    best = _shown(max((stages[name]["scores"]["bleu"] for name in distilled if name != "sft"), default=-1.0))
    rows = []
    for name, stage in stages.items():
        bleu = _shown(stage["scores"]["bleu"])
        row = {"stage": name, "parameters": f"{stage['parameters']:,}", "seconds": f"{stage['seconds']:.0f}"}
        row |= {"BLEU": f"**{bleu}**" if name in distilled and name != "sft" and bleu == best else bleu}
        row |= {"chrF": f"{stage['scores']['chrf']:.1f}"}
        against = {key: found for key, found in stage.get("against", {}).items() if key in ON_SCREEN}
        rows.append(row | {f"BLEU over {BASELINES[key]}": _difference(found) for key, found in against.items()})
    shown = pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True)
    return f"{shown}\n\n{caption(metrics)}" if distilled else shown


def _shown(score: float) -> str:
    return f"{score:.1f}"


def _difference(found: Mapping[str, Mapping[str, float]]) -> str:
    return f"{found['bleu']['delta']:+.1f} (p {found['bleu']['p']:.3f})"


def caption(metrics: Mapping[str, Any]) -> str:
    """On what the students learnt and were tested."""
    data, wrong = metrics["data"], "none of them"
    taught = "teacher" in metrics["stages"] and metrics["arguments"]["teacher_epochs"]
    seen = " but not to the teacher" if taught else ""
    if data["wrong"]:
        wrong = f"{data['wrong']:,} of them ({data['wrong'] / data['kd_pairs']:.0%})"
    return (
        f"Distilled on {data['kd_pairs']:,} pairs that are new to the student{seen}, {wrong} with a wrong "
        f"reference; tested on {data['test_pairs']:,} sentences ({metrics['arguments']['test_split']}). p: paired "
        "bootstrap over these sentences, for one seed."
    )


def distilled_of(metrics: Mapping[str, Any]) -> list[str]:
    """The stages that start from the trained student."""
    return [name for name in metrics["stages"] if name not in PRETRAINED]


def verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence about the first objective's student: whether it gained over its start, and over SFT.

    Nothing is claimed of differences that show as 0.0, of students that do not translate, and of short tests.
    """
    stages, tested = metrics["stages"], metrics["data"]["test_pairs"]
    taught = [name for name in distilled_of(metrics) if name != "sft"]
    if not taught:
        return "Nothing was distilled."
    name, against, score = taught[0], stages[taught[0]]["against"], stages[taught[0]]["scores"]["bleu"]
    gain = against["student"]["bleu"]
    if (most := max(stages[other]["scores"]["bleu"] for other in ("student", *distilled_of(metrics)))) < LEAST_BLEU:
        return f"The student does not translate yet ({most:.1f} BLEU at most): train it longer before you compare."
    few = tested < LEAST_SENTENCES
    what = "The student got better" if gain["delta"] > 0 else "The student got worse"
    if few:
        what = f"No claim from {tested} test sentences, take {LEAST_SENTENCES} or more"
    elif not _counts(gain):
        what = "No clear gain"
    parts = [f"{what}: {name} took it from {score - gain['delta']:.1f} to {score:.1f} BLEU"]
    parts[0] += "" if few else f" ({gain['delta']:+.1f}, p {gain['p']:.3f})"
    if "sft" in against:
        sft = "SFT on the same pairs", stages["sft"]["scores"]["bleu"]
        parts.append(f"{sft[0]} gives {sft[1]:.1f}" if few else _beside(against["sft"]["bleu"], *sft))
    best = max(taught, key=lambda other: stages[other]["scores"]["bleu"])
    if not few and (top := _shown(stages[best]["scores"]["bleu"])) != _shown(score):
        parts.append(f"{best} ends higher, at {top}")
    if "teacher" in stages:
        parts.append(f"the teacher has {stages['teacher']['scores']['bleu']:.1f}")
    return "; ".join(parts) + "."


def _counts(found: Mapping[str, float]) -> bool:
    return found["p"] < ALPHA and _shown(abs(found["delta"])) != _shown(0.0)


def _beside(found: Mapping[str, float], what: str, score: float) -> str:
    delta, p = found["delta"], found["p"]
    if not _counts(found):
        return f"{what} gives {score:.1f}, no clear difference (p {p:.3f})"
    return f"that is {abs(delta):.1f} {'above' if delta > 0 else 'below'} {what}, {score:.1f} (p {p:.3f})"


def write_plots(metrics: Mapping[str, Any], folder: Path) -> None:
    """``loss.png``, ``hard_fraction.png``, ``difficulty.png`` and ``bleu.png``, from ``metrics.json`` alone."""
    stages = metrics["stages"]
    for key, label in CURVES.items():
        figure = Figure(figsize=(10.4, 3.6), layout="tight")
        for axis, pretraining in zip(figure.subplots(1, 2), (True, False), strict=True):
            for name in [name for name in stages if (name in PRETRAINED) == pretraining]:
                log = pd.DataFrame(stages[name]["log_history"], columns=["step", key]).dropna()
                axis.plot(log.step, log[key], label=name)
                axis.legend(fontsize=8)
            axis.set(title="pretraining" if pretraining else "distillation", xlabel="optimizer step", ylabel=label)
        figure.savefig(folder / f"{key}.png", dpi=130)
    draw_bleu([_bleu_of(stages)]).savefig(folder / "bleu.png", dpi=130)


def _bleu_of(stages: Mapping[str, Any]) -> dict[str, float]:
    return {name: stage["scores"]["bleu"] for name, stage in stages.items()}


def draw_bleu(runs: Sequence[Mapping[str, float]]) -> Figure:
    """Of each run, BLEU by stage: a bar from its start to each distilled student; start and teacher as lines."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    bars = [name for name in names if name not in PRETRAINED] or names
    figure = Figure(figsize=(2.4 + max(1.4, 0.5 * len(runs)) * len(bars), 4.0), layout="tight")
    axis = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        own = [name for name in bars if name in run]
        start = run["student"] if "student" not in bars and "student" in run else 0.0
        places = [bars.index(name) + (number - (len(runs) - 1) / 2) * width for name in own]
        colours = ["tab:green" if run[name] >= start else "tab:red" for name in own]
        heights = [run[name] - start for name in own]
        drawn = axis.bar(places, heights, 0.94 * width, bottom=start, color=colours, alpha=0.85)
        axis.bar_label(drawn, [f"{run[name]:.1f}" for name in own], padding=3, fontsize=9 if len(runs) == 1 else 8)
        if start and len(runs) > 1:
            axis.hlines([start] * len(own), *[[p + side * width / 2 for p in places] for side in (-1, 1)], "black")
    for name, style in zip(PRETRAINED, ("-", "--"), strict=True):
        found = [run[name] for run in runs if name in run and name not in bars]
        if found and (name == "teacher" or len(runs) == 1):
            label = "student before" if name == "student" else name
            mean = statistics.mean(found)
            axis.axhline(mean, color="black", linestyle=style, label=f"{label} {mean:.1f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axis.set_xticks(range(len(bars)), bars, rotation=15)
    axis.use_sticky_edges = False  # or the start, where the bars stand, is the frame
    axis.margins(y=0.12)
    axis.set_ylabel("BLEU" if len(runs) == 1 else "BLEU, each seed from its start")
    return figure


def gathered(folders: Sequence[str]) -> dict[str, Any]:
    """Several runs as one small record. Raises ``ValueError`` where a folder has no metrics.json."""
    runs = []
    for folder in folders:
        if (found := read_json(Path(folder) / "metrics.json")) is None:
            raise ValueError(f"{folder!r} has no metrics.json of a finished run")
        stages = {name: {key: s[key] for key in KEPT if key in s} for name, s in found["stages"].items()}
        arguments = {key: value for key, value in found["arguments"].items() if key not in ("output", "worker")}
        arguments |= {key: _without_place(arguments[key]) for key in PRETRAINED}
        runs.append({"seed": found["seed"], "arguments": arguments, "data": found["data"], "stages": stages})
        about = {key: found[key] for key in ("versions", "machine")}
    return about | {"runs": runs}


def _without_place(model: str) -> str:
    """The end of a folder's path; presets and names of the hub stay."""
    path = Path(model)
    return "/".join(path.relative_to(path.anchor).parts[-2:])


def grouped(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The runs whose arguments differ in nothing but the seed and the objectives, together.

    Models that stages of other runs have trained, ``teacher-HASH/model``, count as the same whatever their hash.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        own = {key: value for key, value in run["arguments"].items() if key not in NOT_TOLD}
        own |= {key: re.sub(r"-[0-9a-f]{10}/model$", "", own[key]) for key in PRETRAINED}
        groups.setdefault(str(sorted(own.items(), key=str)), []).append(run)
    return list(groups.values())


def summary(found: Mapping[str, Any]) -> str:
    """Markdown: a table for each group of runs."""
    groups = grouped(found["runs"])
    varying = _varying([runs[0]["arguments"] for runs in groups])
    parts = ["# Results of distill.py"]
    for runs in groups:
        about = ", ".join(f"`{key} {runs[0]['arguments'][key]}`" for key in varying)
        parts += [f"## {about}"] if about else []
        about = caption(runs[0])
        parts += [_group_table(runs), about.replace("for one seed", "for each seed alone") if len(runs) > 1 else about]
    return "\n\n".join(parts) + "\n"


def _varying(arguments: Sequence[Mapping[str, Any]]) -> list[str]:
    own = [key for key in arguments[0] if key not in NOT_TOLD]
    return [key for key in own if len({str(each[key]) for each in arguments}) > 1]


def _group_table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run["stages"]):
        having = [run for run in runs if name in run["stages"]]
        row = {"stage": name} | {
            f"seed {run['seed']}": f"{run['stages'][name]['scores']['bleu']:.1f}" for run in having
        }
        row |= {"mean BLEU": _mean(run["stages"][name]["scores"]["bleu"] for run in having)}
        row |= {"mean chrF": _mean(run["stages"][name]["scores"]["chrf"] for run in having)}
        for baseline, label in BASELINES.items():
            found = [run["stages"][name].get("against", {}).get(baseline) for run in having]
            if all(found):
                deltas = [each["bleu"]["delta"] for each in found]
                most = max(each["bleu"]["p"] for each in found)
                at_most = " at most" if len(having) > 1 else ""
                row[f"over {label}"] = f"{statistics.mean(deltas):+.1f} (p{at_most} {most:.3f})"
        rows.append(row)
    return str(pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True))


def _mean(values: Any) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    found, folder = gathered(args.runs), Path(args.output)
    write_json(folder / "results.json", found)
    write_text(folder / "results.md", summary(found))
    if len(grouped(found["runs"])) == 1:
        content = io.BytesIO()
        draw_bleu([_bleu_of(run["stages"]) for run in found["runs"]]).savefig(content, format="png", dpi=130)
        write_bytes(folder / "bleu.png", content.getvalue())
    print(summary(found))


if __name__ == "__main__":
    run_script(main)
