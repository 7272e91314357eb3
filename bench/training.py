"""Training steps of whole Hugging Face models on a GPU: fused_kd beside eager PyTorch, torch.compile and Liger.

``python -m bench training --out FOLDER`` writes a line of FOLDER/training.jsonl as soon as a row is measured, and
FOLDER/training.md at the end; ``--seconds`` starts no new row after so long, ``--rehearse`` does the same on a CPU with
tiny models, ``--report FILE.jsonl`` makes the tables again.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk

from . import environment
from .measure import clock, peak_memory
from .problems import BETA, IGNORE, LAM
from .registry import IMPLEMENTATIONS, KL, SELF_EVOLUTION, SFT, forward_kl, objective_of, self_evolution, sft
from .session import Row, append, read
from .training_plan import PLAN, REHEARSED, SETTINGS, Setting
from .training_report import markdown
from .worker import guarded

GAMMA = 0.4
# Steps before the timed ones: kernels are compiled and chosen in them.
WARMUP, ROUNDS = 2, 6
# Timed steps of a largest batch, which are long.
FULL_ROUNDS = 2
# A largest batch is known to this share of itself.
RESOLUTION = 1 / 16
SEED = 0

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Hidden states (N, H) and head (V, H) of student and teacher, labels (N,): the mean loss over valid tokens."""


def missing(way: str, group: str, device: str) -> str | None:
    """Why a way cannot be measured here, or None."""
    if not way.startswith("Liger"):
        return None
    if device == "cpu":
        return "Liger's kernels need a GPU"
    return IMPLEMENTATIONS[LIGER[way, group]].missing(device)


LIGER = {
    ("Liger fused", KL): "liger fused kl",
    ("Liger fused", SFT): "liger ce",
    ("Liger chunked", KL): "liger chunked kl",
}
"""The registry's names; Liger has no Self-Evolution."""


def plain_loss(group: str, device: str) -> Loss:
    """The loss as it is usually written: full logits, fp32 softmax."""
    gamma = torch.tensor(GAMMA, device=device)

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
        if group == SFT:
            return sft(h_s, w_s, labels)
        if group == SELF_EVOLUTION:
            return self_evolution(h_s, w_s, h_t, w_t, labels, gamma, LAM, BETA)
        return forward_kl(h_s, w_s, h_t, w_t, labels)

    return loss


@cache
def compiled_loss(group: str, device: str) -> Loss:
    """The same under torch.compile, for any number of tokens."""
    call = torch.compile(plain_loss(group, device))

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, labels: Tensor) -> Tensor:
        for x in (h_s, labels) if group == SFT else (h_s, h_t, labels):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return call(h_s, w_s, h_t, w_t, labels)

    return loss


def liger_loss(way: str, group: str) -> Loss:
    """Liger's module, with what gives it the group's objective: forward KL is its JSD with ``beta`` 0."""
    if (way, group) == ("Liger fused", SFT):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        entropy = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
        return lambda h_s, w_s, h_t, w_t, labels: entropy(w_s, h_s, labels)
    if (way, group) == ("Liger fused", KL):
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=IGNORE)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, ignore_index=IGNORE)


class Models:
    """A setting's models and optimizer on a device; :meth:`step` is a training step in any of the ways.

    The learning rate is 0: the optimizer does all of its work, and all ways meet the same weights in every step.
    """

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting, self.device = setting, device
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(SEED)
            student: Any = setting.student.build()
            teacher: Any = setting.teacher.build()
        self.student = student.to(torch.bfloat16 if setting.weights == "bf16" else torch.float32)
        self.teacher = teacher.to(torch.bfloat16)
        self.student.train()
        self.teacher.eval().requires_grad_(False)
        if setting.checkpointing:
            self.student.gradient_checkpointing_enable()
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in self.parameters)

    def tokens(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.setting.student.vocab, (batch, self.setting.length), generator=generator)
        return ids.to(self.device)

    def loss_of(self, way: str, group: str) -> Callable[[Tensor], Tensor]:
        """Token ids (batch, length) to the loss."""
        if way == "fused_kd":
            criterion = fk.KDLoss(objective_of(group, GAMMA), shift=True).to(self.device)
            return lambda ids: criterion(*self.heads(ids, group), ids)
        if way == "eager":
            loss = plain_loss(group, self.device)
        elif way == "torch.compile":
            loss = compiled_loss(group, self.device)
        else:
            loss = liger_loss(way, group)

        def flat(ids: Tensor) -> Tensor:
            student, teacher = self.heads(ids, group)
            labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()
            other = student if teacher is None else teacher
            return loss(student.hidden.flatten(0, 1), student.weight, other.hidden.flatten(0, 1), other.weight, labels)

        return flat

    def heads(self, ids: Tensor, group: str) -> tuple[fk.LMHead, fk.LMHead | None]:
        """Hidden states and head of the student and, where the group has one, of the teacher."""
        from fused_kd.integrations.transformers import hidden_states, lm_head_of

        teacher = None
        if group != SFT:
            with torch.no_grad():
                teacher = lm_head_of(self.teacher, hidden_states(self.teacher, input_ids=ids))
        return lm_head_of(self.student, hidden_states(self.student, input_ids=ids)), teacher

    def step(self, loss: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """Both forwards, loss, backward, optimizer; the loss, detached."""
        self.drop_gradients()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.setting.weights == "fp32"):
            value = loss(ids)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        norms = [p.grad.float().norm() for p in self.parameters if p.grad is not None]
        return float(torch.stack(norms).norm())

    def seconds(self, step: Callable[[], object], rounds: int) -> list[float]:
        """Of each step by the host's clock, launches and all."""
        found = []
        for _ in range(rounds):
            synchronize(self.device)
            start = clock()
            step()
            synchronize(self.device)
            found.append(clock() - start)
        return found

    def peak(self, step: Callable[[], object]) -> int:
        """Bytes allocated at the most in a step, models and optimizer state included; on a CPU resident ones."""
        found = peak_memory(step, self.drop_gradients, self.gradient_bytes, torch.device(self.device))
        if found is None:
            raise RuntimeError("peak memory is not known here")
        return found.peak


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_step(models: Models, way: str, group: str) -> Row:
    """Loss and gradient norm of the first step, seconds and peak of the timed ones."""
    loss, ids = models.loss_of(way, group), models.tokens(models.setting.batch)
    step = partial(models.step, loss, ids)
    value, norm = float(step()), models.gradient_norm()
    for _ in range(WARMUP):
        step()
    seconds = models.seconds(step, ROUNDS)
    speed = ids.numel() / statistics.median(seconds)
    return {"loss": value, "gradient_norm": norm, "seconds": seconds, "tokens_per_s": speed, "peak": models.peak(step)}


def measure_largest(models: Models, way: str, group: str) -> Row:
    """The largest batch within the limit, and its speed: guessed from the peaks of two small ones, then tried."""
    loss, probes = models.loss_of(way, group), []

    def peak(batch: int) -> float:
        step = partial(models.step, loss, models.tokens(batch))
        try:
            step()
            found: float = models.peak(step)
        except torch.OutOfMemoryError:
            found = float("inf")
        if found == float("inf"):  # outside of the handler, whose traceback keeps the tensors alive
            free()
        probes.append({"batch": batch, "peak": found})
        return found

    few = models.setting.batch
    small, large = peak(few), peak(2 * few)
    slope = max((large - small) / few, 1.0)
    guess = int(few + (models.setting.limit - small) / slope) if large < float("inf") else few
    most = 8 if models.device == "cpu" else 4096
    low, high = largest(lambda batch: peak(batch) <= models.setting.limit, min(max(guess, 1), most), most)
    found: Row = {"largest": low, "refused": high, "limit": models.setting.limit, "probes": probes}
    if low:
        ids = models.tokens(low)
        seconds = models.seconds(partial(models.step, loss, ids), FULL_ROUNDS)
        found |= {"seconds": seconds, "tokens_per_s": ids.numel() / statistics.median(seconds)}
    return found


def largest(fits: Callable[[int], bool], guess: int, most: int) -> tuple[int, int | None]:
    """The largest batch seen to fit (0: none) and the smallest seen not to (None: all up to ``most`` did), near a guess
    and at most :data:`RESOLUTION` of the batch, or one sequence, apart."""

    def stride(batch: int) -> int:
        return max(1, int(batch * RESOLUTION))

    if fits(guess):
        low = guess
        while low < most:
            high = min(low + stride(low), most)
            if not fits(high):
                return low, high
            low = high
        return low, None
    high = guess
    while high > 1:
        low = high - stride(high)
        if fits(low):
            return low, high
        high = low
    return 0, 1


def free() -> None:
    gc.collect()
    fk.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


MEASURE = {"step": measure_step, "largest": measure_largest}


def rows(settings: dict[str, Setting], device: str, end: float, first: int = 1) -> Iterator[Row]:
    """The plan's rows from its part ``first``, one after the other; what cannot be measured says why."""
    models: Models | None = None
    for part in PLAN[first - 1 :]:
        for way in part.ways:
            setting = settings[part.setting]
            row: Row = {"setting": setting.name, "group": part.group, "kind": part.kind, "way": way}
            row |= {"batch": setting.batch, "length": setting.length}
            if time.monotonic() > end:
                yield row | {"status": "not reached"}
                continue
            if reason := missing(way, part.group, device):
                yield row | {"status": "missing", "reason": reason}
                continue
            start = clock()
            if models is None or models.setting != setting:
                models = None
                free()
                models = Models(setting, device)
                described = {"student": setting.student._asdict(), "teacher": setting.teacher._asdict()}
                yield {"kind": "setting", **setting._asdict(), **described, "status": "ok"}
            found = guarded(partial(MEASURE[part.kind], models, way, part.group), "status")
            models.drop_gradients()
            free()
            yield {**row, "status": "ok", **found, "took": round(clock() - start, 2)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where training.jsonl and training.md go")
    parser.add_argument("--seconds", type=float, default=75.0, help="no row starts later than this (default 75)")
    parser.add_argument(
        "--first", type=int, default=1, metavar="N", help="the part of the plan to begin with (default 1)"
    )
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--beside", action="store_true", help="other processes use the GPU too: no speed is told")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--report", type=Path, metavar="FILE", help="make the tables of these lines again")
    args = parser.parse_args(arguments)
    if args.report is not None:
        return report(args.report)
    if args.out is None:
        parser.error("--out or --report must be given")
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and (reason := environment.unsupported()):
        print(f"bench training: {reason}; --rehearse tries it on a CPU", file=sys.stderr)
        return 2
    if not 1 <= args.first <= len(PLAN):
        parser.error(f"--first must be in 1 to {len(PLAN)}, got {args.first}")
    return run(args.out, device, args.seconds, args.first, commit=args.commit, beside=args.beside)


def run(
    out: Path, device: str, seconds: float, first: int = 1, *, commit: str | None = None, beside: bool = False
) -> int:
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    path = out / "training.jsonl"  # lines of an earlier run stay: the latest of a row counts
    about = {"hardware": environment.hardware(device), "versions": environment.versions(), "beside": beside}
    source = environment.source("bench/training.py")
    source["commit"] = commit or source["commit"]
    append(path, {"kind": "environment", **about, "source": source, "now": environment.now(), "status": "ok"})
    for row in rows(REHEARSED if device == "cpu" else SETTINGS, device, end, first):
        append(path, row)
        print({k: v for k, v in row.items() if k not in ("student", "teacher", "probes")}, file=sys.stderr, flush=True)
    return report(path)


def report(path: Path) -> int:
    found = read(path)
    if not found:
        print(f"bench training: {path} has no lines", file=sys.stderr)
        return 2
    text = markdown(found)
    path.with_suffix(".md").write_text(text)
    print(text)
    return int(any(row["status"] == "failed" for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
