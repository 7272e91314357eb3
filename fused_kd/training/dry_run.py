"""What a training would be, before it is one: rows, tokens, steps, memory by part, and a step that is measured."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fused_kd.forecast import Choice
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.sampling import LengthGroupedEpochs
from fused_kd.training.memory import Memory, MicroBatch
from fused_kd.training.metrics import peak_memory_mb
from fused_kd.training.train_options import Train

_PADDED = 0.2  # advice above this share
_CUT = 0.05
_WARM, _MEASURED = 1, 1


@dataclass(frozen=True)
class Amounts:
    """Tokens of a training set, and what a run makes of them; ``rows`` 0 for a stream, of which nothing is known."""

    rows: int
    tokens: int
    with_loss: int
    padding: float
    truncated: int
    skipped: int
    steps: int
    tokens_a_step: float
    batch: MicroBatch


def amounts_of(train: Train, args: TrainingArguments, rows: Any) -> Amounts:
    """Count the rows of a run; of a stream the largest micro-batch is as many tokens as options allow.

    Raises:
        ValueError: no batch is left of the rows.
    """
    each, ranks = args.per_device_train_batch_size, max(args.world_size, 1)
    together = each * ranks * args.gradient_accumulation_steps
    if train.streaming:
        one = 1 if train.packing else each
        batch = MicroBatch(one, train.max_length * each // one, train.max_length * each)
        return Amounts(0, 0, 0, 0.0, 0, 0, args.max_steps, 0.0, batch)
    lengths = [len(row["input_ids"]) for row in rows.rows]
    targets = [len(row["labels"]) - 1 - row["labels"][1:].count(LABEL_PAD) for row in rows.rows]
    longest, most = sorted(lengths)[-each:], sum(sorted(targets)[-each:])
    batch = MicroBatch(1, sum(longest), most) if train.packing else MicroBatch(len(longest), longest[-1], most)
    batches = len(lengths) / (each * ranks)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    if not batches:
        raise ValueError(
            f"dataloader_drop_last must be off: {len(lengths)} rows are fewer than the {each * ranks} of a batch of "
            "all processes"
        )
    share = min(batches * each * ranks / len(lengths), 1.0)
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    padding = 0.0 if train.packing else padding_share(lengths, each, together, args)
    return Amounts(
        len(lengths), sum(lengths), sum(targets), padding, rows.truncated, rows.skipped, steps,
        share * sum(lengths) / an_epoch, batch,
    )  # fmt: skip


def padding_share(lengths: Sequence[int], each: int, together: int, args: TrainingArguments) -> float:
    """How much of an epoch's batches would be padding."""
    order: Sequence[int] = range(len(lengths))
    if args.train_sampling_strategy == "group_by_length":
        order = list(LengthGroupedEpochs(lengths, together, args.seed))
    batches = [[lengths[index] for index in order[at : at + each]] for at in range(0, len(order), each)]
    if args.dataloader_drop_last:
        batches = [batch for batch in batches if len(batch) == each]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / max(padded, 1)


def advice(train: Train, amounts: Amounts) -> list[str]:
    """Lines on what would be wasted."""
    told = []
    if amounts.padding > _PADDED:
        told.append(f"{amounts.padding:.0%} of the batches is padding: --packing true computes none")
    if amounts.rows and amounts.truncated > _CUT * amounts.rows:
        told.append(
            f"{amounts.truncated} of {amounts.rows} rows are cut at max_length={train.max_length}: more keeps them"
        )
    return told


def amounts_lines(args: TrainingArguments, amounts: Amounts) -> list[str]:
    """The amounts as text."""
    each, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = f"global batch {each * args.world_size * accumulated} = {args.world_size} processes x {each} rows x "
    batch, steps = f"{batch}{accumulated} accumulated", f"{amounts.steps} steps"
    if not amounts.rows:
        return [batch, f"a stream of unknown length, {steps}"]
    return [
        batch,
        f"{amounts.rows} rows, {amounts.truncated} truncated, {amounts.skipped} skipped",
        f"{amounts.tokens} tokens, {amounts.with_loss} with loss; padding {amounts.padding:.0%}",
        f"{steps} of {amounts.tokens_a_step:.0f} tokens on average",
    ]


def memory_lines(memory: Memory, batch: MicroBatch) -> list[str]:
    """The memory as text: a line a part, and what each engine of the loss would take."""
    width = max(map(len, memory.parts)) + 2
    lines = [
        f"parameters: {memory.sizes.trained:,} of {memory.sizes.numbers:,} are trained",
        f"expected memory with {batch.rows} x {batch.length} tokens, {batch.targets} of them with loss:",
        *(f"  {name:<{width}}{gigabytes(size):>12}" for name, size in memory.parts.items()),
        f"  {'peak':<{width}}{gigabytes(memory.peak):>12}  in {memory.when}",
    ]
    for engine, plan in memory.engines.items():
        if isinstance(plan, Choice):
            lines.append(f"loss, {engine}: {gigabytes(plan.workspace)} of workspace ({plan.backend})")
        else:
            lines.append(f"loss, {engine}: not here ({plan.partition('; ')[0]})")
    lines.append(f"full logits, which are never made, would take {gigabytes(memory.plan.eager_logits)}")
    return lines + memory.notes


def gigabytes(size: float) -> str:
    """A size with three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


@dataclass(frozen=True)
class Measured:
    """One optimizer step: seconds, input tokens of all processes, and this one's peak in bytes above its start."""

    seconds: float
    tokens: int
    peak: float


def quiet(args: TrainingArguments) -> TrainingArguments:
    """Make the arguments those of a few steps that leave nothing behind, in a folder that goes with the process."""
    args.output_dir = tempfile.mkdtemp(prefix="fused_kd-dry-run-")
    atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)
    args.max_steps = _WARM + _MEASURED
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = args.push_to_hub = False
    args.report_to, args.include_num_input_tokens_seen = [], "all"
    args.logging_strategy = IntervalStrategy.NO
    return args


def measured_step(trainer: Any, amounts: Amounts, before: float) -> Measured:
    """Train a step on the longest rows, after another one, and measure it. Every process of a run calls this.

    Args:
        trainer: made with :func:`quiet` arguments.
        before: bytes of the process before any model was loaded, of which a CPU's peak counts what is above.
    """
    if amounts.rows:
        lengths = [len(trainer.train_dataset[index]["input_ids"]) for index in range(amounts.rows)]
        order = sorted(range(amounts.rows), key=lambda index: lengths[index], reverse=True)
        needed = trainer.args.per_device_train_batch_size * trainer.args.world_size
        needed *= trainer.args.gradient_accumulation_steps * (_WARM + _MEASURED)
        trainer._get_train_sampler = lambda *_: (order * math.ceil(needed / len(order)))[:needed]
    clock = _Clock()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    trainer.train()
    peak = peak_memory_mb(trainer.args.device) * 2**20
    return Measured(clock.seconds, clock.tokens, peak if trainer.args.device.type == "cuda" else peak - before)


def resident(device: torch.device) -> float:
    """Bytes of this process now, or where that is not told at its peak so far; 0 on a GPU, whose allocator counts from
    the training on."""
    if device.type == "cuda":
        return 0.0
    file = Path("/proc/self/statm")
    if not file.is_file():
        return peak_memory_mb(device) * 2**20
    return float(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured_lines(found: Measured, amounts: Amounts, memory: Memory, args: TrainingArguments) -> list[str]:
    """The measurement as text, with what it says of the whole run."""
    rate = found.tokens / max(found.seconds, 1e-9)
    lines = [f"measured: {found.seconds:.3g} s a step of {found.tokens} tokens, {rate:.0f} tokens/s"]
    if amounts.rows:
        seconds = amounts.steps * amounts.tokens_a_step / (1 - amounts.padding) / rate
        lines.append(f"all {amounts.steps} steps: about {duration(seconds)}, without evaluation and checkpoints")
    else:
        lines.append(f"all {amounts.steps} steps: about {duration(amounts.steps * found.seconds)}")
    what = "of the CUDA allocator" if args.device.type == "cuda" else "of resident memory, which is coarse"
    lines.append(f"measured peak: {gigabytes(found.peak)} {what}; expected {gigabytes(memory.peak)}")
    return lines


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds, self.tokens = math.nan, 0
        self._begun = (0.0, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = (self._time(args), int(state.num_input_tokens_seen))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._time(args) - self._begun[0]
        self.tokens = int(state.num_input_tokens_seen) - self._begun[1]

    def _time(self, args: Any) -> float:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        return time.perf_counter()
