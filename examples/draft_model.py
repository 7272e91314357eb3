"""A small draft for speculative decoding, on a reduced vocabulary, distilled from its frozen target.

    python examples/draft_model.py                                  # a tiny target and its draft, minutes on two cores
    python examples/draft_model.py --compare true --seeds 3         # several objectives from the same start
    python examples/draft_model.py --compare true --warm_up 3       # which is then trained with KL already
    python examples/draft_model.py --target PATH_OR_HUB_NAME --data pairs.jsonl.gz --prompt paper --vocabulary 32000

The draft reads the target's ids and writes only the most frequent of them: its head has --vocabulary rows, and a map of
columns says which of the target's they are. Reported before and after: the tokens that greedy assisted generation makes
with one forward of the target, and the share of drafted tokens that speculative sampling would keep. The same command
goes on where it stopped; everything is in --output.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import torch
import transformers
from drafting import Draft, Drafter, continuations, kept_share, new_draft, reachable_share
from matplotlib.figure import Figure

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.integrations.transformers import rows_of
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_pairs
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.models import load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.prompts import PROMPTS, encode_prompts, get_prompt, render_sample, tokenize_pairs, training_texts
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.specs import ObjectiveSpec, parse_objective
from fused_kd.training.stage import Stages, check_counts, fingerprint, read_json, write_json, write_text
from fused_kd.training.trainer import KDTrainer

TARGET = "tiny-teacher"
COMPARED = ["forward_kd:lam=1", "acceptance", "total_variation", "acceptance_mix"]
WARM_UP = "warm_up"
# finite whatever the draft cannot write, so they may see it
BOUNDED = (fk.Acceptance, fk.TotalVariation)

COLUMNS = {
    "length": ("tokens a target forward", 1, ".2f"),
    "matched": ("drafted tokens used, %", 100, ".1f"),
    "kept": ("sum min(p, q), %", 100, ".1f"),
}
PLOTTED = {"length": "tokens a forward of the target", "kept": "mean of sum min(p, q), held-out"}


def option(default: Any, told: str) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": told})


@dataclass
class Settings:
    """What is drafted for whom, and how it is trained."""

    output: str = option("runs/draft_model", "folder of the models, metrics.json, results.md and drafts.png")
    target: str | None = option(None, "a causal LM's folder or hub name; null: a tiny one is trained here")
    data: str = option("builtin", "pairs to train on: builtin, a file, a folder or a hub name")
    direction: str = option("en-de", "source and target language of the pairs")
    prompt: str = option("tiny", f"template of the prompts, one of {', '.join(PROMPTS)}")
    objective: list[str] = field(
        default_factory=lambda: ["acceptance"],
        metadata={"help": "of the draft: name, name:key=value,... or a sum of them; a draft for each"},
    )
    compare: bool = option(False, f"also train with {', '.join(COMPARED)}")
    seeds: int = option(1, "how often each draft is started and trained, with the seeds 0, 1, ...")
    tail: str | None = option(None, "null: bucket for acceptance and total_variation, renormalize for others")
    vocabulary: int = option(256, "tokens that the draft can write, the special ones among them")
    hidden: int | None = option(None, "width of the draft, an even number; null: half of the target's")
    layers: int = option(1, "layers of the draft")
    vocab: int = option(800, "tokens of the tokenizer that is trained for the tiny target")
    max_length: int = option(256, "tokens of prompt and response together; what is longer is cut")
    train_limit: int | None = option(8000, "pairs to train on; null: all")
    target_epochs: float = option(4, "of the tiny target")
    target_rate: float = option(4e-3, "learning rate of the tiny target")
    warm_up: float = option(0.0, f"epochs of {COMPARED[0]}, whose draft all others then start from; 0: none")
    epochs: float = option(3, "of each draft")
    learning_rate: float = option(4e-3, "of the drafts")
    batch: int = option(32, "pairs a step")
    held_out: int = option(100, "pairs whose sources are the prompts of the measurement")
    drafted: int = option(5, "tokens that the draft proposes before each forward of the target")
    max_new_tokens: int = option(64, "of each text that is generated for the measurement")

    def __post_init__(self) -> None:
        names = ("seeds", "vocabulary", "layers", "batch", "held_out", "drafted", "max_new_tokens")
        check_counts(**{name: getattr(self, name) for name in names})
        for name in ("target_epochs", "target_rate", "epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.warm_up < math.inf:
            raise ValueError(f"warm_up must be 0 or above and finite, got {self.warm_up}")
        if self.hidden is not None and (self.hidden < 2 or self.hidden % 2):
            raise ValueError(f"hidden must be an even number of at least 2, got {self.hidden}")
        texts = [*self.objective, *(COMPARED if self.compare else [])]
        self.specs = {spec.slug: spec for spec in map(parse_objective, texts)}
        if not self.specs:
            raise ValueError("objective must name at least one, got none")
        for spec in self.specs.values():
            if not spec.objective.spec.needs_teacher:
                raise ValueError(f"objective must be one that reads the target, got {spec.text!r}")
            check_together(spec.objective, self.tail_of(spec))

    def tail_of(self, spec: ObjectiveSpec) -> str:
        bounded = all(isinstance(part, BOUNDED) for _, part in spec.objective.summands)
        return self.tail or ("bucket" if bounded else "renormalize")


def check_together(objective: fk.objectives.Objective, tail: str) -> None:
    """Raise ``ValueError`` where there is no loss of both, before a target is trained for it."""
    one, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    teacher = fk.LMHead(one, torch.ones(3, 1), columns=torch.arange(2), tail=tail)
    fk.kd_loss(fk.LMHead(one, torch.ones(2, 1)), teacher, label, objective)


def check_vocabulary(size: int, tokenizer: Any) -> None:
    """Raise ``ValueError`` where a draft of so many tokens could not be, before a target is trained for it."""
    least, most = len(set(tokenizer.all_special_ids)), len(tokenizer)
    if not least < size <= most:
        raise ValueError(
            f"vocabulary must be above {least}, the special tokens, and at most {most}, the tokenizer's, got {size}"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (settings,) = parse(Settings, argv, description=__doc__)
    console, output = make_console(), Path(settings.output)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = settings.target or TARGET
    if threads := threads_for([name]):
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages, template, direction = Stages(output), get_prompt(settings.prompt), settings.direction
    pairs = {"train": load_pairs(settings.data, "train", direction, limit=settings.train_limit)}
    pairs["valid"] = load_pairs(settings.data, "valid", direction, limit=settings.held_out)

    def tokenizer_in(folder: Path) -> Any:
        return shared_tokenizer([name], folder, training_texts(template, {direction: pairs["train"]}), settings.vocab)

    texts = {"model": model_content(name), "pairs": fingerprint(pairs), "direction": direction}
    texts |= {key: getattr(settings, key) for key in ("prompt", "max_length", "vocab")}
    tokens = stages("tokenizer", tokenizer_in, texts)
    tokenizer = tokenizer_in(tokens)
    check_vocabulary(settings.vocabulary, tokenizer)
    rows = {key: tokenize_pairs(tokenizer, template, of, direction, settings.max_length) for key, of in pairs.items()}
    prompts = encode_prompts(tokenizer, [template.render(pair.source, direction) for pair in pairs["valid"]])
    console.print(f"{rows['train']}; the first:\n{render_sample(tokenizer, rows['train'][0])}")

    def train(folder: Path, title: str, model: Any, teacher: Any, objective: Any, how: dict, **loss: Any) -> None:
        trainer = KDTrainer(
            model, teacher, objective, args=training_arguments(folder, **how), train_dataset=rows["train"],
            data_collator=Collator(padding_id(tokenizer)), processing_class=tokenizer, **loss,
        )  # fmt: skip
        fit(trainer, folder, title)

    def trained_target(folder: Path) -> None:
        train(folder, "target", load_model(name, tokenizer, 0), None, fk.SFT(), how)

    how = {"num_train_epochs": settings.target_epochs, "learning_rate": settings.target_rate}
    how["per_device_train_batch_size"] = settings.batch
    needs = [tokens] if settings.target else [tokens, stages("target", trained_target, how, needs=[tokens])]
    path = settings.target or str(needs[-1] / "model")
    target = load_model(path, tokenizer, 0).to(device).eval().requires_grad_(False)

    labels = {key: [torch.tensor(row["labels"]) for row in of.rows] for key, of in rows.items()}
    V, special = rows_of(target.get_output_embeddings().weight), tokenizer.all_special_ids
    mapped = fk.VocabMap.most_frequent(labels["train"], settings.vocabulary, V, always=special)
    coverage = mapped.coverage(torch.cat(labels["valid"]))
    reachable = reachable_share(mapped, target, rows["valid"])
    told = f"{coverage:.1%} of the held-out tokens, {reachable:.1%} of the target's probability there"
    console.print(f"{mapped!r}: {told}")

    def alone(folder: Path) -> None:
        write_json(folder / "made.json", continuations(target, prompts, settings.max_new_tokens))

    lengths = {"max_new_tokens": settings.max_new_tokens}
    needs.append(stages("greedy", alone, lengths, needs=needs))
    greedy = read_json(needs[-1] / "made.json")

    def measure(folder: Path) -> None:
        draft = Drafter.from_pretrained(folder / "model").to(device).eval()
        found = continuations(target, prompts, settings.max_new_tokens, draft, settings.drafted)
        scores = {
            "length": found["tokens"] / found["target"],
            "matched": (found["tokens"] - found["target"]) / max(found["draft"], 1),
            "kept": kept_share(draft, target, rows["valid"]),
            "as_target": sum(a == b for a, b in zip(found["made"], greedy["made"], strict=True)),
            "prompts": len(prompts),
            "speed": greedy["seconds"] / found["seconds"],
        }
        write_json(folder / "scores.json", scores)

    def start(folder: Path, seed: int) -> None:
        draft = new_draft(target, mapped.columns, settings.hidden, settings.layers, seed)
        draft.save_pretrained(folder / "model")
        measure(folder)

    def drafts(folder: Path, begun: Path, spec: ObjectiveSpec, tail: str, how: dict) -> None:
        loss = {"beta_schedule": spec.beta_schedule, "vocab_map": mapped, "tail": tail}
        train(folder, folder.name, Draft.from_pretrained(begun / "model"), target, spec.objective, how, **loss)
        measure(folder)

    found: list[dict] = []

    def trained(title: str, begun: Path, spec: ObjectiveSpec, seed: int, epochs: float) -> Path:
        about = {"spec": spec, "tail": settings.tail_of(spec), "how": how | {"num_train_epochs": epochs, "seed": seed}}
        work, shown = partial(drafts, begun=begun, **about), about | {"spec": spec.text}
        folder = stages(f"{title}.{seed}", work, shown, needs=[*needs, begun])
        shown = {"draft": title if title == WARM_UP else spec.text, "tail": about["tail"], "seed": seed}
        found.append(shown | read_json(folder / "scores.json"))
        return folder

    form = {key: getattr(settings, key) for key in ("vocabulary", "hidden", "layers", "drafted")}
    how |= {"learning_rate": settings.learning_rate}
    for seed in range(settings.seeds):
        begun = stages(f"start.{seed}", partial(start, seed=seed), form | {"seed": seed}, needs=needs)
        found.append({"draft": "untrained", "tail": "", "seed": seed, **read_json(begun / "scores.json")})
        if settings.warm_up:
            begun = trained(WARM_UP, begun, parse_objective(COMPARED[0]), seed, settings.warm_up)
        for slug, spec in settings.specs.items():
            trained(slug, begun, spec, seed, settings.epochs)
    result = {"arguments": asdict(settings), "versions": versions(), "machine": devices()}
    result |= {"vocabulary": repr(mapped), "coverage": coverage, "reachable": reachable, "drafts": found}
    write_json(output / "metrics.json", result)
    report = table(pd.DataFrame(found))
    write_text(output / "results.md", report + "\n")
    write_plot(pd.DataFrame(found), output / "drafts.png")
    print(f"{report}\nmetrics.json, results.md, drafts.png and the models are in {output}")
    return result


def table(runs: pd.DataFrame) -> str:
    """Means over the seeds, in the order of the drafts, with the largest distance of a seed from them."""
    lines = []
    for (draft, tail), of in runs.groupby(["draft", "tail"], sort=False):
        line = {"draft": draft, "tail": tail}
        for name, (title, scale, form) in COLUMNS.items():
            values = of[name] * scale
            spread = f" ± {(values - values.mean()).abs().max():{form}}" if len(of) > 1 else ""
            line[title] = f"{values.mean():{form}}{spread}"
        lines.append(line | {"the target's own text": f"{of.as_target.sum()} of {of.prompts.sum()}"})
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def write_plot(runs: pd.DataFrame, file: Path) -> None:
    names = list(dict.fromkeys(runs.draft))
    figure = Figure(figsize=(3 + 1.6 * len(names), 3.8), layout="tight")
    for axis, (key, label) in zip(figure.subplots(1, 2), PLOTTED.items(), strict=True):
        bars = axis.bar(names, [runs[runs.draft == name][key].mean() for name in names], color="tab:blue", alpha=0.6)
        axis.bar_label(bars, fmt="%.3f", padding=8)
        axis.plot(runs.draft, runs[key], "k.", markersize=4)
        axis.tick_params(axis="x", rotation=25)
        axis.set_ylabel(label)
        axis.margins(y=0.12)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    run_script(main)
