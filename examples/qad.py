"""Quantisation-aware distillation: a student with int4 or fp8 weights, recovered towards its own unquantised self.

    python examples/qad.py                                             # a tiny model, minutes on two cores
    python examples/qad.py --model FOLDER --text train.txt --max_length 256 --learning_rate 2e-5 --train_limit 400
    python examples/qad.py --kind int4 --group_size 128 --objective sft forward_kd:lam=1 generalized_jsd

The student begins as a copy of the model whose linear layers, all but the head, round their weights in the forward pass
(torchao's fake quantisation; gradients pass straight through). Reported on held-out text: perplexity and KL to the
model itself, unquantised, rounded without training, and trained with each objective. Each training leaves TITLE/model,
weights as they were trained, and TITLE/quantised, an ordinary folder whose weights are on the quantised grid. The same
command goes on where it stopped; everything is in --output. Needs torchao: pip install 'fused_kd[quantize]'.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.integrations.weights import straight_through
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_pairs
from fused_kd.training.files import sound, text_rows
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.models import load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.prompts import get_prompt, tokenize_pairs, tokenize_texts, training_texts
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.specs import ObjectiveSpec, parse_objective
from fused_kd.training.stage import Stages, check_counts, fingerprint, read_json, write_json, write_text
from fused_kd.training.trainer import KDTrainer

TINY = "tiny-teacher"
STATISTICS = ("log_q_y", "kl", "top_1")
COLUMNS = {
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL to the model", ".4f"),
    "agree": ("same first token, %", ".1f"),
}
PLOTTED = {"perplexity": "perplexity, held-out", "kl": "KL to the unquantised model, held-out"}


def option(default: Any, told: str) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": told})


@dataclass
class Settings:
    """What is quantised how, and what recovers it."""

    output: str = option("runs/qad", "folder of the models, metrics.json, results.md and qad.png")
    model: str | None = option(None, "a causal LM's folder or hub name; null: a tiny one is trained here")
    text: str | None = option(None, "a text file, a line each; the last --held_out lines measure; null: builtin pairs")
    kind: Literal["int4", "fp8"] = option("int4", "of the weights: int4 in groups, or fp8 (e4m3) with a scale a row")
    group_size: int = option(32, "weights of a row that share a scale, for int4")
    objective: list[str] = field(
        default_factory=lambda: ["sft", "forward_kd:lam=1"],
        metadata={"help": "of a training each: name, name:key=value,... or a sum of them"},
    )
    seeds: int = option(1, "how often each is trained, with the seeds 0, 1, ... of the order of the rows")
    vocab: int = option(800, "tokens of the tokenizer that is trained for the tiny model")
    max_length: int = option(256, "tokens of a row; what is longer is cut")
    train_limit: int | None = option(4000, "rows to train on; null: all")
    held_out: int = option(100, "rows that are measured on")
    model_epochs: float = option(3, "of the tiny model")
    model_rate: float = option(4e-3, "learning rate of the tiny model")
    epochs: float = option(1, "of each training with quantised weights")
    learning_rate: float = option(5e-4, "of those")
    batch: int = option(16, "rows a step")

    def __post_init__(self) -> None:
        check_counts(
            **{name: getattr(self, name) for name in ("group_size", "seeds", "max_length", "held_out", "batch")}
        )
        for name in ("model_epochs", "model_rate", "epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        self.specs = {spec.slug: spec for spec in map(parse_objective, self.objective)}
        if not self.specs:
            raise ValueError("objective must name at least one, got none")


def fake_quantised(model: Any, kind: str, group_size: int) -> Any:
    """Let every linear layer but the head round its weight in each forward pass, in place; the model.

    Names and shapes of the parameters stay, so it is saved and loaded as what it was.

    Raises:
        ValueError: torchao is missing, or rows of a layer do not fall into groups of ``group_size``.
    """
    ao, qat = _torchao()
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if kind == "int4" and isinstance(layer, nn.Linear) and layer is not head and layer.in_features % group_size:
            raise ValueError(
                f"group_size must divide the {layer.in_features} weights of a row of {name}, got {group_size}"
            )
    if kind == "int4":
        config = qat.QATConfig(ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(group_size)), step="prepare")
    else:
        # without a least value rows of zeros become NaN
        weights = qat.Float8FakeQuantizeConfig(granularity=ao.PerRow(), hp_value_lb=1e-12)
        config = qat.QATConfig(weight_config=weights, step="prepare")
    ao.quantize_(model, config, filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and layer is not head)
    for layer in model.modules():
        if getattr(layer, "weight_fake_quantizer", None) is not None:
            layer.weight_fake_quantizer = StraightThrough(layer.weight_fake_quantizer)
    return model


class StraightThrough(nn.Module):
    """A fake quantiser that gradients pass straight through; torchao's own for float8 lets most of them be 0."""

    def __init__(self, quantiser: nn.Module) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, values: Tensor) -> Tensor:
        return straight_through(self.quantiser, values)


@torch.no_grad()
def on_the_grid(model: Any) -> Any:
    """A model of :func:`fake_quantised` with ordinary layers, whose weights are what it computes with, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if getattr(layer, "weight_fake_quantizer", None) is not None:
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                plain.weight = nn.Parameter(layer.weight_fake_quantizer(layer.weight).to(layer.weight.dtype))
                plain.bias = layer.bias
                setattr(parent, name, plain)
    return model


def _torchao() -> tuple[Any, Any]:
    try:
        import torchao.quantization as ao
        import torchao.quantization.qat as qat
    except ImportError:
        raise ValueError("torchao is not installed: pip install 'fused_kd[quantize]'") from None
    return ao, qat


@torch.no_grad()
def measured(student: Any, teacher: Any, rows: Any, collator: Collator, batch: int = 8) -> dict[str, float]:
    """Of the held-out targets: perplexity, mean KL(p||q), and how often both models' first token is the same."""
    criterion = fk.KDLoss(fk.ForwardKD(lam=1.0), shift=True)
    totals, count = torch.zeros(len(STATISTICS), dtype=torch.float64), 0
    for start in range(0, len(rows), batch):
        inputs = collator([rows[i] for i in range(start, min(start + batch, len(rows)))])
        labels = inputs.pop("labels").to(student.device)
        inputs = {name: x.to(student.device) for name, x in inputs.items() if isinstance(x, Tensor)}
        heads = [lm_head_of(model, hidden_states(model, **inputs)) for model in (student, teacher)]
        told = criterion.evaluate(*heads, labels, statistics=STATISTICS).statistics
        totals += torch.stack([told[name].double().sum().cpu() for name in STATISTICS])
        count += int((labels[:, 1:] != -100).sum())
    likelihood, kl, same = (totals / max(count, 1)).tolist()
    return {"perplexity": math.exp(min(-likelihood, 700.0)), "kl": kl, "agree": 100 * same, "tokens": count}


@dataclass
class Study:
    """What is trained and measured, on rows that are tokenised once."""

    settings: Settings
    tokenizer: Any
    rows: dict[str, Any]

    def __post_init__(self) -> None:
        self.collator = Collator(padding_id(self.tokenizer))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher: Any = None

    def train(self, folder: Path, title: str, model: Any, teacher: Any, objective: Any, how: dict, **loss: Any) -> None:
        trainer = KDTrainer(
            model, teacher, objective, args=training_arguments(folder, **how), train_dataset=self.rows["train"],
            data_collator=self.collator, processing_class=self.tokenizer, **loss,
        )  # fmt: skip
        fit(trainer, folder, title)

    def begin(self, folder: Path, how: dict) -> None:
        """The model itself, where none is given."""
        self.train(folder, "model", load_model(TINY, self.tokenizer, 0), None, fk.SFT(), how)

    def load(self, source: Any) -> Any:
        return load_model(source, self.tokenizer, 0, dtype="float32").to(self.device).eval()

    def quantised(self, source: Any) -> Any:
        return fake_quantised(self.load(source), self.settings.kind, self.settings.group_size)

    def measure(self, model: Any, folder: Path) -> None:
        write_json(folder / "scores.json", measured(model, self.teacher, self.rows["valid"], self.collator))

    def write(self, model: Any, folder: Path) -> None:
        """What the model computes with, as an ordinary folder, and the measures of what that gives."""
        on_the_grid(model).save_pretrained(folder / "quantised")
        self.tokenizer.save_pretrained(folder / "quantised")
        self.measure(self.load(folder / "quantised"), folder)

    def recover(self, folder: Path, source: str, spec: ObjectiveSpec, how: dict) -> None:
        needed, model = self.teacher if spec.objective.spec.needs_teacher else None, self.quantised(source)
        self.train(folder, folder.name, model, needed, spec.objective, how, beta_schedule=spec.beta_schedule)
        self.write(self.quantised(folder / "model"), folder)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (settings,) = parse(Settings, argv, description=__doc__)
    _torchao()
    output = Path(settings.output)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads := threads_for([settings.model or TINY]):
        torch.set_num_threads(threads)
    stages = Stages(output)
    tokens, tokenizer, rows = tokenized(settings, stages)
    make_console().print(repr(rows["train"]))
    study, needs, path = Study(settings, tokenizer, rows), [tokens], settings.model
    common = {"per_device_train_batch_size": settings.batch, "save_steps": 0.25}
    if path is None:
        how = common | {"num_train_epochs": settings.model_epochs, "learning_rate": settings.model_rate}
        needs.append(stages("model", partial(study.begin, how=how), how, needs=needs))
        path = str(needs[-1] / "model")
    study.teacher = study.load(path).requires_grad_(False)
    form = {"kind": settings.kind, "group_size": settings.group_size if settings.kind == "int4" else None}
    found = []

    def take(title: str, seed: int | None, work: Any, given: dict) -> None:
        folder = stages(title if seed is None else f"{title}.{seed}", work, given, needs=needs)
        found.append({"weights": given.get("spec", title), "seed": seed, **read_json(folder / "scores.json")})

    take("unquantised", None, partial(study.measure, study.teacher), {"held_out": settings.held_out})
    take("rounded", None, lambda folder: study.write(study.quantised(path), folder), form)
    how = common | {"num_train_epochs": settings.epochs, "learning_rate": settings.learning_rate}
    for seed in range(settings.seeds):
        for slug, spec in settings.specs.items():
            given = how | {"seed": seed, "data_seed": seed}
            work = partial(study.recover, source=path, spec=spec, how=given)
            take(slug, seed, work, form | {"spec": spec.text, "how": given})
    result = {"arguments": asdict(settings), "versions": versions(), "machine": devices(), "runs": found}
    write_json(output / "metrics.json", result)
    report = table(pd.DataFrame(found))
    write_text(output / "results.md", report + "\n")
    write_plot(pd.DataFrame(found), output / "qad.png")
    print(f"{report}\nmetrics.json, results.md, qad.png and the models are in {output}")
    return result


def tokenized(settings: Settings, stages: Stages) -> tuple[Path, Any, dict[str, Any]]:
    """The folder of the tokenizer, the tokenizer, and the rows to train and to measure on."""
    texts, template, direction = read_texts(settings), get_prompt("tiny"), "en-de"
    name = settings.model or TINY

    def tokenizer_in(folder: Path) -> Any:
        used = training_texts(template, {direction: texts["train"]}) if settings.text is None else texts["train"]
        return shared_tokenizer([name], folder, used, settings.vocab)

    about = {"model": model_content(name), "texts": fingerprint(texts), "max_length": settings.max_length}
    folder = stages("tokenizer", tokenizer_in, about | {"vocab": settings.vocab})
    tokenizer, rows = tokenizer_in(folder), {}
    for split, found in texts.items():
        if settings.text is None:
            rows[split] = tokenize_pairs(tokenizer, template, found, direction, settings.max_length)
        else:
            begins = [tokenizer.bos_token or ""] * len(found)
            rows[split] = tokenize_texts(tokenizer, begins, found, settings.max_length)
    return folder, tokenizer, rows


def read_texts(settings: Settings) -> dict[str, list]:
    """Rows to train and to measure on."""
    if settings.text is None:
        limits = {"train": settings.train_limit, "valid": settings.held_out}
        return {split: load_pairs("builtin", split, "en-de", limit=limit) for split, limit in limits.items()}
    try:
        lines = [row["text"] for _, row in sound(text_rows(Path(settings.text)))]
    except ValueError as error:
        raise ValueError(f"text={settings.text!r} must be a text file in UTF-8: {error}") from None
    if len(lines) <= settings.held_out:
        raise ValueError(f"text={settings.text!r} must have more than held_out={settings.held_out} lines")
    return {"train": lines[: -settings.held_out][: settings.train_limit], "valid": lines[-settings.held_out :]}


def table(runs: pd.DataFrame) -> str:
    """Means over the seeds, with the largest distance of a seed from them."""
    lines = []
    for weights, of in runs.groupby("weights", sort=False):
        line = {"weights": weights}
        for name, (title, form) in COLUMNS.items():
            spread = f" ± {(of[name] - of[name].mean()).abs().max():{form}}" if len(of) > 1 else ""
            line[title] = f"{of[name].mean():{form}}{spread}"
        lines.append(line)
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def write_plot(runs: pd.DataFrame, file: Path) -> None:
    names = list(dict.fromkeys(runs.weights))
    figure = Figure(figsize=(3 + 1.6 * len(names), 3.8), layout="tight")
    for axis, (key, label) in zip(figure.subplots(1, 2), PLOTTED.items(), strict=True):
        bars = axis.bar(names, [runs[runs.weights == name][key].mean() for name in names], color="tab:blue", alpha=0.6)
        axis.bar_label(bars, fmt="%.3f", padding=8)
        axis.plot(runs.weights, runs[key], "k.", markersize=4)
        axis.tick_params(axis="x", rotation=25)
        axis.set_ylabel(label)
        axis.margins(y=0.12)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    run_script(main)
