"""The stages that make the transfer set: answers, translations there and back, scores, pairs, and the filter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fused_kd.training.data.instructions import Instruction
from fused_kd.training.generation import generate_to
from fused_kd.training.pipeline import Stage
from fused_kd.training.runs import remove_folder, write_json
from fused_kd.training.sdrrl.rows import Task, dump, read_jsonl, read_tasks, render, write_rows
from fused_kd.training.sdrrl.transfer_set import FIELDS, Candidate, answered, kept
from fused_kd.training.sdrrl.workshop import Workshop

GIVEN, OWN = "given", "own"


class Transfer:
    """Pairs in both languages, with given answers or a model's own.

    Attributes:
        pairs, filtered: the stages of all candidates and of those that the filter keeps, by where the answers are
            from: "given", "own" or "own-sSEED".
        collected: the stages of own answers, alike.
    """

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.pairs: dict[str, Stage] = {}
        self.filtered: dict[str, Stage] = {}
        self.collected: dict[str, Stage] = {}
        self.questions = self._scored("questions", [shop.tasks], self._question_texts)

    def add_given(self) -> None:
        """The answers that the instructions came with."""
        made = self._scored("answers-given", [self.shop.tasks], self._given_texts)
        self._add_pairs(GIVEN, made, None)

    def add_own(self, title: str, start: Stage) -> None:
        """The answers of a stage's model."""
        collected = self.collected[title] = self._collect(title, start)
        made = self._scored(f"answers-{title}", [self.shop.tasks, collected], partial(self._own_texts, collected))
        self._add_pairs(title, made, collected)

    def _collect(self, title: str, start: Stage) -> Stage:
        r = self.shop.recipe
        about = {"prompt": r.prompt, "answers": r.answers, "languages": r.languages}
        work = partial(self._answer_own, start=start)
        return self.shop.p.add(f"collect-{title}", work, about, needs=[self.shop.tasks, start])

    def _answer_own(self, out: Path, start: Stage) -> None:
        r, tasks = self.shop.recipe, self.shop.asked()
        prompts = [render(task.texts[r.source], r.prompt) for task in tasks]
        made = generate_to(out, *self.shop.generator(r.model, start), prompts, r.answers)
        answers = [generation.text if generation.finished else None for generation in made]
        found, counts = answered(tasks, answers, r.source)
        counts["as_given"] = sum(found[t.id].output == t.texts[r.source].output for t in tasks if t.id in found)
        rows = [dump(Task(task.id, task.kind, {r.source: found[task.id]})) for task in tasks if task.id in found]
        write_rows(out, {"answers": rows})
        write_json(out / "counts.json", counts)

    def _question_texts(self) -> list[str]:
        texts = [task.texts[self.shop.recipe.source] for task in self.shop.asked()]
        return [text for i in texts for text in (i.instruction, i.input) if text]

    def _given_texts(self) -> list[str]:
        return [task.texts[self.shop.recipe.source].output for task in self.shop.asked()]

    def _own_texts(self, collected: Stage) -> list[str]:
        return [task.texts[self.shop.recipe.source].output for task in read_tasks(collected.folder / "answers.jsonl")]

    def _scored(self, title: str, needs: Sequence[Stage], texts: Callable[[], list[str]]) -> Stage:
        """Translations of texts, translations back where the scorer asks for them, and scores; a stage each."""
        shop, r = self.shop, self.shop.recipe
        a, b = r.languages
        add = partial(shop.p.add, settings={"decoding": r.translator.decoding, "languages": r.languages})

        def translate(out: Path) -> None:
            self._write_pairs(out, texts(), a, b)

        def translate_back(out: Path) -> None:
            self._write_pairs(out, [text for text in _translations(forward).values() if text], b, a)

        forward = add(f"translate-{title}", translate, needs=[*needs, shop.translator])
        scorer = r.quality.make()
        back = add(f"back-{title}", translate_back, needs=[forward, shop.translator]) if scorer.needs_back else None

        def work(out: Path) -> None:
            made, returned = _translations(forward), {} if back is None else _translations(back)
            done = {text: translation for text, translation in made.items() if translation}
            backs = [] if back is None else [returned.get(translation, "") for translation in done.values()]
            scores = scorer(list(done), list(done.values()), backs) if done else []
            found = dict(zip(done, scores, strict=True))
            write_rows(out, {"scores": [{"text": t, "translation": made[t], "score": found.get(t)} for t in made]})

        return shop.p.add(f"score-{title}", work, r.quality.about(), needs=[forward, *([back] if back else [])])

    def _write_pairs(self, out: Path, texts: list[str], source: str, target: str) -> None:
        made = self.shop.translate(out / "work", texts, source, target)
        write_rows(out, {"pairs": ({"text": text, "translation": found} for text, found in made.items())})
        remove_folder(out / "removed")
        if (out / "work").exists():
            os.replace(out / "work", out / "removed")  # a kill leaves no torn run of that name
            remove_folder(out / "removed")

    def _add_pairs(self, title: str, answers: Stage, collected: Stage | None) -> None:
        needs = [self.shop.tasks, self.questions, answers] + ([] if collected is None else [collected])
        languages, tau = self.shop.recipe.languages, self.shop.recipe.quality.tau

        def work(out: Path) -> None:
            write_rows(out, {"candidates": map(_candidate_row, self._candidates(answers, collected))})

        def sift(out: Path) -> None:
            good, counts = kept(read_candidates(pairs), tau)
            write_rows(out, {"candidates": map(_candidate_row, good)})
            write_json(out / "counts.json", counts)

        pairs = self.shop.p.add(f"pairs-{title}", work, {"languages": languages}, needs=needs)
        self.pairs[title] = pairs
        self.filtered[title] = self.shop.p.add(f"filter-{title}", sift, {"tau": tau}, needs=[pairs])

    def _candidates(self, answers: Stage, collected: Stage | None) -> list[Candidate]:
        questions, outputs = _scores(self.questions), _scores(answers)
        own = None if collected is None else {t.id: t for t in read_tasks(collected.folder / "answers.jsonl")}
        found = []
        for task in self.shop.asked():
            if own is not None and task.id not in own:
                continue
            source = (task if own is None else own[task.id]).texts[self.shop.recipe.source]
            texts = {name: getattr(source, name) for name in FIELDS if getattr(source, name)}
            made = {name: (outputs if name == "output" else questions)[text] for name, text in texts.items()}
            whole = all(translation for translation, _ in made.values())
            target = Instruction(**{name: made[name][0] if name in made else "" for name in FIELDS})
            scores = {name: score for name, (_, score) in made.items()} if whole else {}
            found.append(Candidate(task.id, source, target, scores))
        return found


def read_candidates(stage: Stage) -> list[Candidate]:
    """The candidates that a stage of pairs, or of the filter, wrote."""
    return [
        Candidate(row["id"], Instruction(**row["source"]), Instruction(**row["target"]), row["scores"])
        for row in read_jsonl(stage.folder / "candidates.jsonl")
    ]


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    sides = {"source": candidate.source._asdict(), "target": candidate.target._asdict()}
    return {"id": candidate.id, **sides, "scores": dict(candidate.scores)}


def _translations(stage: Stage) -> dict[str, str]:
    return {row["text"]: row["translation"] for row in read_jsonl(stage.folder / "pairs.jsonl")}


def _scores(stage: Stage) -> dict[str, tuple[str, float]]:
    return {row["text"]: (row["translation"], row["score"]) for row in read_jsonl(stage.folder / "scores.jsonl")}
