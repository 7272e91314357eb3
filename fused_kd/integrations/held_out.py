"""What an evaluation tells beside its loss: cross-entropy, and how near the student is to its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_kd import SFT, ForwardKD, KDOutput, LMHead, TopK, kd_loss, top_k_of
from fused_kd.engines.plan import BudgetTooSmall
from fused_kd.objectives import Objective

# sums over target tokens, by the names under which they are told
_STATISTICS = {"ce": "log_q_y", "kl": "kl", "top_1": "top_1"}
_SIGN = {"ce": -1.0}


class HeldOut:
    """Sums over the target tokens of an evaluation, at temperature 1, on the device; no more than a chunk of logits.

    Args:
        objective: the loss's. options: its, as of :func:`fused_kd.kd_loss`; ``vocab_size`` and ``shift`` too.
        names: of "ce", "kl" and "top_1", what can be told: see :func:`names_of`.
    """

    def __init__(self, objective: Objective, options: dict[str, Any], names: tuple[str, ...]) -> None:
        self.names, self.options = names, options
        self._whole = tuple(name for name in names if name != "top_1" or "kl" in names)
        statistics_too = options["lists"] is None and options["engine"] != "streaming" and options["backend"] != "cuda"
        spec = objective.spec
        # else the loss's own pass cannot tell them, and a second one does
        self._with_loss = statistics_too and (
            (not spec.needs_teacher and "kl" not in names)
            or (spec.needs_teacher and "kl" in names and _is_one(options["temperature"]))
        ) and options["memory_budget"] is None  # fmt: skip
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float32)

    def measured(
        self, head: LMHead, teacher: Any, labels: Tensor, objective: Objective, **arguments: Any
    ) -> tuple[KDOutput, list[Tensor]]:
        """The loss's own result, and the sums of a batch in the order of the names.

        Args:
            teacher: its head or lists, or None.
            arguments: further ones of the loss.
        """
        statistics = [_STATISTICS[name] for name in self._whole]
        told = statistics if self._with_loss else ()
        own = teacher if objective.spec.needs_teacher else None
        out = kd_loss(head, own, labels, objective, statistics=told, **arguments, **self.options)
        found = out.statistics
        if not self._with_loss:
            found = self._apart(head, teacher, labels, statistics)
        sums = {
            name: _SIGN.get(name, 1.0) * found[stat].sum()
            for name, stat in zip(self._whole, statistics, strict=True)
        }  # fmt: skip
        if "top_1" in self.names and "top_1" not in sums:
            sums["top_1"] = self._first_of_list(head, teacher, labels)
        return out, [sums[name] for name in self.names]

    def add(self, sums: list[Tensor], tokens: Tensor) -> None:
        """A batch's. Does not synchronise."""
        values = torch.stack([*sums, tokens.to(sums[0], non_blocking=True)])
        # float32 no longer counts beyond 16 million tokens; Apple's GPUs have nothing else
        values = values if values.device.type == "mps" else values.double()
        self.sums = self.sums.to(values) + values

    def means(self, sums: list[float]) -> dict[str, float]:
        """Of the sums of all processes; "perplexity" too."""
        found = {name: value / max(sums[-1], 1.0) for name, value in zip(self.names, sums, strict=False)}
        if "ce" in found:
            found["perplexity"] = math.exp(found["ce"]) if found["ce"] < 700 else math.inf
        return found

    def _apart(self, head: LMHead, teacher: Any, labels: Tensor, statistics: list[str]) -> Mapping[str, Tensor]:
        """The numbers without the loss."""
        kept = {name: self.options[name] for name in ("shift", "vocab_size")}
        objective = ForwardKD() if "kl" in self.names else SFT()
        own = teacher if "kl" in self.names else None

        def run(budget: int | None) -> Mapping[str, Tensor]:
            with torch.no_grad():
                out = kd_loss(head, own, labels, objective, statistics=statistics, memory_budget=budget, **kept)
            return out.statistics

        return _within(run, self.options["memory_budget"]) if statistics else {}

    def _first_of_list(self, head: LMHead, teacher: TopK, labels: Tensor) -> Tensor:
        """How often the student's first token is the list's."""
        targets = labels != self.options.get("ignore_index", -100)
        if self.options["shift"]:
            targets = torch.nn.functional.pad(targets[..., 1:], (0, 1))
        index = targets.flatten().nonzero().squeeze(1).to(head.hidden.device, non_blocking=True)
        if not len(index):
            return head.hidden.new_zeros((), dtype=torch.float32)
        rows = head.hidden.flatten(0, -2)[index]
        K = teacher.indices.shape[-1]
        listed, ids = (each.reshape(-1, K)[index.to(each.device)] for each in (teacher.log_probs, teacher.indices))
        first = ids.gather(1, listed.argmax(1, keepdim=True))
        own = LMHead(rows.detach(), head.weight.detach(), _detached(head.bias), head.logit_scale, head.softcap)

        def run(budget: int | None) -> TopK:
            return top_k_of(own, 1, vocab_size=self.options["vocab_size"], memory_budget=budget)

        found: Tensor = _within(run, self.options["memory_budget"]).indices == first.to(rows.device)
        return found.float().sum()


def names_of(objective: Objective, teaching: Any, vocabulary: Any) -> tuple[str, ...]:
    """What can be told of a student and its teachers.

    Lists do not know all of p: "kl" is left out, and "top_1" but for one cache whose lists begin with the largest
    entry. With two vocabularies "kl" and "top_1" are left out, and "ce" too where the labels only say which tokens
    count.
    """
    names: list[str] = []
    if vocabulary is None or vocabulary.own_ids or objective.spec.reads_label:
        names.append("ce")
    if teaching is None or vocabulary is not None:
        return tuple(names)
    lists = [form for form in teaching.given if form.lists]
    if not lists:
        names += ["kl", "top_1"]
    elif len(teaching.forms) == 1 and getattr(lists[0].given, "keep", "lists") == "lists":
        names.append("top_1")
    return tuple(names)


def _within(run: Callable[[int | None], Any], budget: int | None) -> Any:
    """``run`` within that budget, or the smallest that will do: training may need none, as it can stream."""
    try:
        return run(budget)
    except BudgetTooSmall as error:
        return run(error.minimum)


def _is_one(temperature: Any) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 1.0


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
