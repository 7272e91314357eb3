"""The cycle: translate, filter, fine-tune, score; again from the model that came out, until chrF stops rising."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fused_kd.training.cycle_distill.settings import CycleDistill
from fused_kd.training.cycle_distill.stages import CycleStages
from fused_kd.training.cycle_distill.texts import collect_texts
from fused_kd.training.loading import load_pretrained
from fused_kd.training.pipeline import Stage
from fused_kd.training.runs import read_json


@dataclass(frozen=True)
class Round:
    """One iteration of an arm: what it is trained on, the model, its scores."""

    arm: str
    iteration: int
    rows: Stage
    model: Stage
    scores: Stage

    @property
    def chrf(self) -> float:
        """On the valid split, truncated."""
        return float((read_json(self.scores.folder / "scores.json") or {})["valid"]["chrf"])


class Cycle:
    """All arms of a configuration.

    Args:
        config: everything that the numbers depend on.
        folder: where the stages lie.
    """

    def __init__(self, config: CycleDistill, folder: str | Path) -> None:
        self.config = config
        self.stages = CycleStages(config, folder)
        self.arms: dict[int, dict[str, list[Round]]] = {}
        self.bases: dict[int, tuple[Stage, Stage]] = {}
        for seed in config.seeds:
            self._add(seed)

    def _add(self, seed: int) -> None:
        config, stages = self.config, self.stages
        base = stages.base(seed)
        own = f"-seed{seed}" if config.pretrain is not None else ""  # a named base translates alike for all seeds
        self.bases[seed] = base, stages.evaluation(base, f"base{own}")
        first = stages.translation(base, f"base{own}", config.soft_lists)
        arms = self.arms[seed] = {}
        for variant in config.variants:
            soft = variant != "hard"
            arms[variant] = []
            model, translation = base, first
            for iteration in range(1, config.iterations + 1):
                # of the same translations both soft variants make the same rows
                title = (
                    f"{'soft' if soft else 'hard'}-1{own}" if iteration == 1 else f"{variant}-{iteration}-seed{seed}"
                )
                rows = stages.synthetic(translation, title, soft=soft)
                start = base if config.restart_from_base else model
                title = f"{variant}-{iteration}-seed{seed}"
                model = stages.training(variant, title, start, rows, seed)
                arms[variant].append(Round(variant, iteration, rows, model, stages.evaluation(model, title)))
                if iteration < config.iterations:
                    translation = stages.translation(model, title, config.k if soft else None)
        if config.control:
            arms["control"] = self._fixed("control", base, stages.pairs_rows(), seed)
        if config.has_references:
            kept = arms[config.variants[0]][0].rows
            arms["ceiling"] = self._fixed("ceiling", base, stages.reference_rows(kept, f"ceiling{own}"), seed)

    def _fixed(self, arm: str, base: Stage, rows: Stage, seed: int) -> list[Round]:
        """An arm whose rows are the same in every iteration."""
        rounds, model = [], base
        # from the base each would be the same again
        for iteration in range(1, 1 + (1 if self.config.restart_from_base else self.config.iterations)):
            title = f"{arm}-{iteration}-seed{seed}"
            model = self.stages.training(arm, title, model, rows, seed)
            rounds.append(Round(arm, iteration, rows, model, self.stages.evaluation(model, title)))
        return rounds

    def rounds(self, seed: int) -> dict[str, list[Round]]:
        """One seed's rounds, as far as the scores that are there tell which are wanted.

        A variant ends after the first iteration that does not raise chrF on the valid split, if so configured. Control
        and ceiling go on for as many iterations as the longest variant.
        """
        base, scores = self.bases[seed]
        if not scores.done:
            return {}
        start = Round("base", 0, base, base, scores).chrf
        wanted: dict[str, list[Round]] = {}
        longest = 0
        for arm, rounds in self.arms[seed].items():
            if arm in self.config.variants:
                wanted[arm] = list(self._until_it_stops(rounds, start)) if self.config.stop else rounds
                longest = max(longest, len(wanted[arm]))
            else:
                wanted[arm] = rounds[:longest]
        return wanted

    @staticmethod
    def _until_it_stops(rounds: list[Round], best: float) -> Iterator[Round]:
        for each in rounds:
            yield each
            if not each.scores.done or each.chrf <= best:
                return
            best = each.chrf

    def work(self, tell: Callable[[Stage], None] = lambda stage: None) -> Iterator[Stage]:
        """Do what is wanted, with other processes of the same folder; yields the stages that this one did."""
        yield from self.stages.pipeline.work(self._wanted, tell)

    def _wanted(self) -> list[Stage]:
        known = [self.rounds(seed) for seed in self.config.seeds]
        later = [each.scores for arms in known for rounds in arms.values() for each in rounds]
        return [scores for _, scores in self.bases.values()] + later

    def scored_by(self, stage: Stage) -> list[Round]:
        """The round whose scores a stage wrote, if it wrote any."""
        everything = (each for arms in self.arms.values() for rounds in arms.values() for each in rounds)
        return [each for each in everything if each.scores.name == stage.name]

    def plan(self) -> list[tuple[str, str]]:
        """Of each stage "done", "begun" or "to do", and its name; a variant that stops early leaves some undone."""
        return self.stages.pipeline.plan()

    def check(self) -> None:
        """Find what is missing, without any work: texts, the base's tokenizer and config.

        Raises:
            ValueError: no such file, split, model or hub name; the message names it.
        """
        from transformers import AutoConfig

        if self.config.pretrain is None:
            tokenizer = self.stages.tokenizer
            try:
                load_pretrained(AutoConfig, self.config.model)
            except (OSError, ValueError) as error:
                raise ValueError(f"model={self.config.model!r} has no configuration: {error}") from error
            if tokenizer.eos_token_id is None:
                raise ValueError(f"model={self.config.model!r}: its tokenizer has no EOS token")
        if not self.stages.texts_stage.done:
            collect_texts(self.config)
