"""A study, from data to scores: every stage of it, each in a folder named after what it is made from."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from fused_kd.training.data.prompts import tokenize_texts
from fused_kd.training.generation import generate_to
from fused_kd.training.pipeline import Pipeline, Stage
from fused_kd.training.runs import write_json
from fused_kd.training.sdrrl.recipe import Recipe
from fused_kd.training.sdrrl.rows import dump, read_jsonl, read_training_rows, render, write_rows
from fused_kd.training.sdrrl.scoring import score_answers
from fused_kd.training.sdrrl.transfer import GIVEN, OWN, Transfer, read_candidates
from fused_kd.training.sdrrl.transfer_set import (
    COMBINATIONS,
    Arm,
    Candidate,
    Switching,
    combine,
    fill,
    translation_rows,
)
from fused_kd.training.sdrrl.workshop import Workshop


class Study:
    """A recipe in a folder: its stages, none of them done yet.

    Args:
        recipe: what to do.
        folder: where the stages lie; several recipes may share it, and what they have in common is done once.
        processes: of the distributed run that trains.

    Attributes:
        stages: in the order in which one process does them.
        sets, trained, tested: the stages of each (arm, seed); the arm "" is the model before.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, processes: int = 1) -> None:
        self.recipe = recipe
        recipe.training.settings(0, processes, "best")  # says what does not fit before any work
        self.p = Pipeline(folder)
        self.shop = Workshop(recipe, self.p, processes)
        self.transfer = Transfer(self.shop)
        self.sets: dict[tuple[str, int], Stage] = {}
        self.trained: dict[tuple[str, int], Stage] = {}
        self.tested: dict[tuple[str, int], Stage] = {}
        answers = {arm.answers for arm in recipe.arms.values()}
        if GIVEN in answers:
            self.transfer.add_given()
        for seed in recipe.seeds:
            start = self.shop.start(seed)
            if self.shop.pretrains:
                self.trained["", seed] = start
            self._test("", seed, start)
            # a model that is there answers alike for every seed
            own = f"{OWN}-s{seed}" if self.shop.pretrains else OWN
            if OWN in answers and own not in self.transfer.pairs:
                self.transfer.add_own(own, start)
            for name, arm in recipe.arms.items():
                self._add_arm(name, arm, seed, start, own)

    @property
    def stages(self) -> list[Stage]:
        return self.p.stages

    def until(self, last: str) -> list[Stage]:
        """What to finish to have all stages of a kind, with what they need.

        Kinds are "collect", "translate" (there and back), "filter", "set", "train" and "test", which is everything.
        """
        wanted: dict[str, list[Stage]] = {
            "collect": list(self.transfer.collected.values()),
            "translate": [stage for stage in self.stages if stage.title.startswith(("translate-", "back-"))],
            "filter": list(self.transfer.filtered.values()),
            "set": list(self.sets.values()),
            "train": list(self.trained.values()),
            "test": self.stages,
        }
        return wanted[last]

    def _add_arm(self, name: str, arm: Arm, seed: int, start: Stage, own: str) -> None:
        r, p = self.recipe, self.p
        found = None
        if arm.answers != "reference":
            of_kind = self.transfer.filtered if arm.quality_filter else self.transfer.pairs
            found = of_kind[GIVEN if arm.answers == GIVEN else own]
        # what the whole recipe has is the measure of every arm
        whole = self.transfer.filtered.get(own) if r.rows is None else None
        needs = list({stage.name: stage for stage in (self.shop.tasks, found, whole) if stage is not None}.values())
        about = {"arm": arm, "seed": seed, "rows": r.rows, "wording": r.wording, "languages": r.languages}
        about["p"] = r.p if arm.code_switch else None
        work = partial(self._write_set, arm=arm, seed=seed, found=found, whole=whole)
        rows = p.add(f"set-{name}-s{seed}", work, about, needs=needs, files=[r.dictionary] if arm.code_switch else [])
        self.sets[name, seed] = rows
        about = {"training": r.training, "seed": seed, "prompt": r.prompt, "max_length": r.max_length, "dtype": r.dtype}
        train = lambda out: self._train_arm(stage, rows, start, seed)  # noqa: E731
        stage: Stage = p.add(f"train-{name}-s{seed}", train, about, needs=[rows, start])
        self.trained[name, seed] = stage
        self._test(name, seed, stage)

    def _write_set(self, out: Path, arm: Arm, seed: int, found: Stage | None, whole: Stage | None) -> None:
        r = self.recipe
        held = {task.id for task in self.shop.read("validation")}
        if found is None:
            tasks = self.shop.asked()
            pairs = [Candidate(task.id, task.texts[r.source], task.texts[r.target], {"input": 1.0}) for task in tasks]
        else:
            # without a translation there is no pair, filter or not; the rich language alone asks for none
            alone = set(arm.combinations) == {"ss"}
            pairs = [candidate for candidate in read_candidates(found) if candidate.scores or alone]
        switching = Switching(self.shop.dictionaries(), r.p, seed) if arm.code_switch else None
        parallel = read_jsonl(self.shop.tasks.folder / "parallel.jsonl")
        train = [pair for pair in pairs if pair.id not in held]
        rows = combine(train, arm.combinations, r.languages, r.wording, switching)
        if arm.parallel:
            rows += translation_rows(parallel, r.languages, r.wording)
        # held-out questions in the arm's own combinations, as they are
        valid = combine([pair for pair in pairs if pair.id in held], arm.combinations, r.languages, r.wording)
        if not rows or not valid:
            raise ValueError(
                f"{len(rows)} training and {len(valid)} validation rows are left of {len(self.shop.asked())} "
                f"instructions: lower quality.tau={r.quality.tau}, or give more instructions"
            )
        count = r.rows or len(rows)
        if whole is not None:
            kept = sum(candidate.id not in held for candidate in read_candidates(whole))
            count = len(COMBINATIONS) * kept + 2 * len(parallel)
        filled = fill(rows, count, seed)
        write_rows(out, {"train": map(dump, filled), "valid": map(dump, valid)})
        parts = Counter(row.part for row in filled)
        write_json(
            out / "counts.json", {"rows": len(filled), "different": len(rows), "valid": len(valid), "parts": parts}
        )

    def _train_arm(self, stage: Stage, rows: Stage, start: Stage, seed: int) -> None:
        r = self.recipe
        tokenizer = self.shop.tokenizer(r.model)
        sets = []
        for name in ("train", "valid"):
            found = read_training_rows(rows.folder / f"{name}.jsonl")
            prompts = [render(row.instruction, r.prompt) for row in found]
            sets.append(tokenize_texts(tokenizer, prompts, [row.instruction.output for row in found], r.max_length))
        self.shop.fit(stage, r.model, start, sets[0], sets[1], r.training, seed)

    def _test(self, name: str, seed: int, model: Stage) -> None:
        r = self.recipe
        if r.instructions is not None and r.instructions.tests is None:
            return
        about = {"prompt": r.prompt, "answers": r.answers, "languages": r.languages, "test": r.test}
        title = f"test-{name}-s{seed}" if name else f"test-before-s{seed}" if self.shop.pretrains else "test-before"
        work = partial(self._answer_test, model=model)
        self.tested[name, seed] = self.p.add(title, work, about, needs=[self.shop.tasks, model])

    def _answer_test(self, out: Path, model: Stage) -> None:
        r = self.recipe
        scores = {}
        for language in r.languages:
            tasks = [task for task in self.shop.read(r.test) if language in task.texts]
            if not tasks:
                continue
            prompts = [render(task.texts[language], r.prompt) for task in tasks]
            answers = generate_to(out / language, *self.shop.generator(r.model, model), prompts, r.answers).texts()
            scores[language] = score_answers(tasks, answers, language)
            rows = [
                {"id": task.id, **task.texts[language]._asdict(), "answer": answer}
                for task, answer in zip(tasks, answers, strict=True)
            ]
            write_rows(out, {f"answers.{language}": rows})
        write_json(out / "scores.json", scores)
