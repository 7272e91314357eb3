"""Table and figures of MT-LLM, from its ``metrics.json`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_kd.training.drawing import pyplot, save_figure


def print_tables(metrics: dict[str, Any], console: Console) -> None:
    """Accuracy and retrieval by system and language: means over seeds, with each seed's average beside them."""
    seeds = metrics["seeds"]
    languages = metrics["config"]["languages"]
    shown = {
        "accuracy": f"balanced accuracy, % (chance {100 * metrics['chance']:.1f})",
        "retrieval": "retrieval@1 of the English sentence, %",
    }
    for key, title in shown.items():
        if not metrics["mean"][key]:
            continue
        table = Table(title=title)
        for column in ("system", "en", *languages, f"mean of {', '.join(languages)}", "its seeds"):
            table.add_column(column, justify="left" if column == "system" else "right")
        for system, scores in metrics["mean"][key].items():
            cells = [f"{100 * scores[name]:.1f}" if name in scores else "" for name in ("en", *languages)]
            each = [transfer(_scores(seed, key)[system], languages) for seed in seeds.values()]
            table.add_row(
                system, *cells, f"{100 * transfer(scores, languages):.1f}", " ".join(f"{100 * x:.1f}" for x in each)
            )
        console.print(table)
    if metrics["bleu"]:
        console.print("BLEU into English: " + ", ".join(f"{name} {score}" for name, score in metrics["bleu"].items()))


def transfer(scores: dict[str, float], languages: list[str]) -> float:
    """The mean over the languages, English left out."""
    return sum(scores[name] for name in languages) / len(languages)


def write_plots(metrics: dict[str, Any], folder: str | Path) -> list[Path]:
    """``adaptation.png`` (MSE and FVU over steps), ``accuracy.png`` and ``retrieval.png``; what is missing is left out.

    Returns their paths.
    """
    plt = pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="tight")
    for axis, key, label in zip(axes, ("mse", "fvu"), ("MSE", "fraction of variance unexplained"), strict=True):
        for seed, made in metrics["seeds"].items():
            log = made["training"]["adapt"]["log_history"]
            axis.plot(
                [entry["step"] for entry in log], [entry[key] for entry in log], label=f"seed {seed}", linewidth=1.4
            )
        axis.set(xlabel="optimizer step of stage 1", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    written.append(save_figure(figure, folder / "adaptation.png"))
    for key, label in (("accuracy", "balanced accuracy"), ("retrieval", "retrieval@1")):
        if metrics["mean"][key]:
            written.append(save_figure(_bars(metrics, key, label), folder / f"{key}.png"))
    return written


def _bars(metrics: dict[str, Any], key: str, label: str) -> Any:
    """A group of bars a system, one a language; dots are seeds."""
    plt = pyplot()
    means = metrics["mean"][key]
    languages = ["en", *metrics["config"]["languages"]]
    figure, axis = plt.subplots(figsize=(2.5 + 1.25 * len(means), 4.4), layout="tight")
    width = 0.8 / len(languages)
    for place, (language, color) in enumerate(zip(languages, plt.get_cmap("Set2").colors, strict=False)):
        offset = (place - (len(languages) - 1) / 2) * width
        for group, (system, scores) in enumerate(means.items()):
            if language not in scores:
                continue
            axis.bar(
                group + offset,
                scores[language],
                width,
                color=color,
                label=language if group == 0 or language == "en" else None,
            )
            for made in metrics["seeds"].values():
                axis.plot(group + offset, _scores(made, key)[system][language], ".", color="black", markersize=3)
    if key == "accuracy":
        axis.axhline(metrics["chance"], color="grey", linestyle="--", linewidth=1, label="chance")
    axis.set_xticks(
        range(len(means)), [system.replace(", ", ",\n") for system in means], rotation=20, ha="right", fontsize=8
    )
    axis.set(ylabel=label, ylim=(0, 1))
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axis.legend(
        handles.values(), handles.keys(), fontsize=8, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, 1.12)
    )
    axis.grid(alpha=0.3, axis="y")
    return figure


def _scores(seed: dict[str, Any], key: str) -> dict[str, dict[str, float]]:
    if key == "retrieval":
        found: dict[str, dict[str, float]] = seed[key]
        return found
    return {system: {k: v["balanced"] for k, v in scores.items()} for system, scores in seed[key].items()}
