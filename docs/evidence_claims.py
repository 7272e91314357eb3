"""Each paper's claims, written as differences that should be above 0, and what was seen of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import evidence_data as data
import evidence_plane as plane
import evidence_recipes as recipes
import pandas as pd
from evidence_data import EXAMPLES, Effect, compare, gain
from evidence_recipes import Scores

CONVERGED, WRONG = "table, clean, BLEU", "table, 30 % wrong references, BLEU"
LABELS = {  # of a folder of results and an arm
    ("", "hard"): "best of 24 samples, one H200",
    ("", "greedy"): "greedy, one H200",
    ("tiny", "hard"): "greedy, two cores",
    ("tiny", "soft"): "greedy and soft, two cores",
}
MACHINES = {"gpu": "one H200", "": "two cores"}  # of folders of SDRRL's results
PARTS = {
    "no_own_answers": "own answers, not given ones",
    "no_filter": "the filter",
    "no_code_switch": "code-switched questions",
    "no_parallel": "parallel sentences",
    "no_cross": "crossed languages",
}


PAIRS = {
    "Self-Evolution - SFT": ("self_evolution", "sft"),
    "Self-Evolution - ForwardKD": ("self_evolution", "forward_kd"),
    "ForwardKD - SFT": ("forward_kd", "sft"),
    "the gate: Self-Evolution - Skew": ("self_evolution", "skew"),
    "Self-Evolution - its Top-K form": ("self_evolution", "self_evolution_top_k"),
    "Self-Evolution - its progressive β": ("self_evolution", "progressive_beta"),
    "floor 0.3 - Self-Evolution": ("floor_0.3", "self_evolution"),
    "floor 0.3 - ForwardKD": ("floor_0.3", "forward_kd"),
}


@dataclass(frozen=True)
class Claim:
    """``text`` says what should be above 0, ``where`` the data or the measure of this ``effect``."""

    text: str
    where: str
    effect: Effect


def self_evolution() -> list[Claim]:
    frame, found = data.table1(), []
    for condition, where in (("clean", CONVERGED), ("wrong_references", WRONG)):
        own = frame[frame.study == condition]
        found += order(own, where)
        nearer = compare(own, "self_evolution", "forward_kd", column="similarity")
        found.append(Claim("likeness to the teacher's output: Self-Evolution - ForwardKD", where, nearer))
    for folder in plane.regime_folders():
        frame = plane.regimes(folder)
        own = frame[(frame.student == "language model") & (frame.noise == 0)]
        found += order(own, f"a language model, {plane.STUDIES.get(folder.name, folder.name)}, chrF")
    return found


def order(frame: pd.DataFrame, where: str) -> list[Claim]:
    """Of one cell: each method of the paper's order against the next, as far as they are there."""
    present = set(frame.method)
    pairs = {text: pair for text, pair in PAIRS.items() if set(pair) <= present}
    found = [Claim(text, where, compare(frame, *pair)) for text, pair in pairs.items()]
    return [*found, Claim("Self-Evolution - the student before it", where, gain(frame, "self_evolution"))]


def differences(sides: dict[str, tuple[Scores, Scores]], where: str) -> list[Claim]:
    """Of those whose sides share a seed."""
    return [Claim(text, where, Effect.of(*pair)) for text, pair in sides.items() if set(pair[0]) & set(pair[1])]


def cycle_distill() -> list[Claim]:
    found, paths = [], recipes.results("cycle_distill")
    for (name, arm), where in LABELS.items():
        score = partial(recipes.cycle, paths[name])
        last = recipes.last_iteration(paths[name])
        sides = {
            "iteration 1 - the base as it is": (score(arm), score("raw")),
            "iteration 1 - the base cut at its first line break": (score(arm), score("base")),
            "the same in BLEU": (score(arm, metric="bleu"), score("base", metric="bleu")),
            "iteration 3 - the base, in BLEU": (score(arm, last, "bleu"), score("base", metric="bleu")),
            "iteration 1 - as many steps on the few real pairs": (score(arm), score("control")),
            "iteration 1 - as many steps of its pre-training": (score(arm), score("continued")),
            "iteration 3 - iteration 1": (score(arm, last), score(arm)),
            "iteration 3 - as many steps of its pre-training": (score(arm, last), score("continued", last)),
            "iteration 3, soft - hard": (score(arm, last), score("hard", last) if arm == "soft" else {}),
        }
        found += differences(sides, f"{where}, chrF")
    return found


def sdrrl() -> list[Claim]:
    arms = {"SDRRL - before": "before", "SDRRL - translate-then-SFT": "translate_sft"}
    parts = {f"{text}: SDRRL - without": arm for arm, text in PARTS.items()}
    found = []
    for name, machine in MACHINES.items():
        score = partial(recipes.sdrrl, recipes.results("sdrrl")[name])
        for language, which in (("de", "target"), ("en", "source")):
            sides = {
                f"{text}{unit}": (score("sdrrl", language, metric), score(arm, language, metric))
                for metric, unit, of in (
                    ("accuracy", "", arms),
                    ("chrf", ", completions, chrF", arms),
                    ("accuracy", "", parts),
                )
                for text, arm in of.items()
            }
            found += differences(sides, f"{which} language, {machine}, points")
    return found


def mt_llm() -> list[Claim]:
    sides = {
        "MT-LLM - the LLM alone": "LLM alone",
        "MT-LLM - translate-test with the same MT model": "translate-test",
        "MT-LLM - the MT encoder with a head": "MT encoder, frozen",
        "the first stage: MT-LLM - without": "MT-LLM, mse-unadapted",
        "self-distillation - labels": "MT-LLM, cross-entropy",
    }
    score = partial(recipes.mt_llm, recipes.results("mt_llm")[""])
    own = score("MT-LLM, mse")
    found = differences(
        {text: (own, score(system)) for text, system in sides.items()}, "translator of captions, points"
    )
    for name, by_seed in recipes.translators().items():
        found.append(
            Claim("MT-LLM - translate-test with the same MT model", f"{name}, points", Effect(tuple(by_seed.values())))
        )
    return found


def floor() -> list[Claim]:
    """Of a real model. Lower is better there, so the differences are the other's minus the floor's."""
    found = []
    for study, student in (("near", "24 of 30 layers"), ("cpu", "12 of 30 layers")):
        frame = recipes.smollm2(EXAMPLES / f"smollm2/results/{study}/results.json")
        for method, text in (("self_evolution", "no floor - floor 0.3"), ("forward_kd", "ForwardKD - floor 0.3")):
            for column, name in (("ce", "cross-entropy"), ("kl", "KL to the teacher")):
                effect = compare(frame, method, "self_evolution_floor", column=column)
                found.append(Claim(text, f"{student}, {name}", effect))
    return found


def demo() -> list[Claim]:
    pairs = {
        "floor 0.3 - ForwardKD": ("floor_0.3", "forward_kd"),
        "floor 0.3 - SFT": ("floor_0.3", "sft"),
        "ForwardKD - SFT": ("forward_kd", "sft"),
    }
    starts = {"floor 0.3": "floor_0.3", "ForwardKD": "forward_kd", "SFT": "sft"}
    found = []
    for folder, where in (("", "make demo, BLEU"), ("unseen", "a teacher that has not seen the pairs, BLEU")):
        frame = plane.demo(folder)
        found += [Claim(text, where, compare(frame, *names)) for text, names in pairs.items()]
        found += [Claim(f"{text} - the student before", where, gain(frame, name)) for text, name in starts.items()]
    return found


SECTIONS = {
    "demo": demo,
    "self_evolution": self_evolution,
    "cycle_distill": cycle_distill,
    "sdrrl": sdrrl,
    "mt_llm": mt_llm,
    "floor": floor,
}


def table(section: str) -> str:
    """A row a claim, a column a place where it was looked at."""
    claims = SECTIONS[section]()
    places = list(dict.fromkeys(claim.where for claim in claims))
    cells: dict[str, dict[str, str]] = {}
    for claim in claims:
        cells.setdefault(claim.text, {})[claim.where] = f"{claim.effect} {claim.effect.verdict}"
    rows = [[text, *(own.get(place, "") for place in places)] for text, own in cells.items()]
    return data.markdown(["above 0?", *places], rows)


def sweeps() -> str:
    """BLEU by Γ and by β, one seed."""
    rows = []
    for name, parameter in (("Γ", "gamma"), ("β", "beta")):
        scores = data.sweep(parameter)
        best = max(scores.values())
        told = [
            f"{value:g}: **{score:.1f}**" if score == best else f"{value:g}: {score:.1f}"
            for value, score in scores.items()
        ]
        rows.append([name, ", ".join(told)])
    return data.markdown(["", "BLEU by value"], rows)
