"""Each paper's claims, written as differences that should be above 0, and what was seen of them."""

from __future__ import annotations

from dataclasses import dataclass

import evidence_data as data
import evidence_plane as plane
from evidence_data import Effect, compare, gain

CONVERGED, WRONG = "clean, BLEU", "30 % wrong references, BLEU"
PARTS = {
    "no_own_answers": "own answers, not given ones",
    "no_filter": "the filter",
    "no_code_switch": "code-switched questions",
    "no_parallel": "parallel sentences",
    "no_cross": "crossed languages",
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
        pairs = {
            "Self-Evolution - SFT": ("self_evolution", "sft"),
            "Self-Evolution - ForwardKD": ("self_evolution", "forward_kd"),
            "ForwardKD - SFT": ("forward_kd", "sft"),
            "the gate: Self-Evolution - Skew": ("self_evolution", "skew"),
            "Self-Evolution - its Top-K form": ("self_evolution", "self_evolution_top_k"),
            "Self-Evolution - its progressive β": ("self_evolution", "progressive_beta"),
        }
        found += [Claim(text, where, compare(own, *names)) for text, names in pairs.items()]
        nearer = compare(own, "self_evolution", "forward_kd", column="similarity")
        found.append(Claim("likeness to the teacher's output: Self-Evolution - ForwardKD", where, nearer))
        found.append(Claim("Self-Evolution - the student before it", where, gain(own, "self_evolution")))
    return found


def cycle_distill() -> list[Claim]:
    found = []
    for arm, where in (("hard", "hard labels, chrF"), ("soft", "soft labels, chrF")):
        sides = {
            "iteration 1 - the base as it is": (data.cycle(arm), data.cycle("raw")),
            "iteration 1 - the base cut at its first line break": (data.cycle(arm), data.cycle("base")),
            "iteration 1 - as many steps on the few real pairs": (data.cycle(arm), data.cycle("control")),
            "iteration 3 - iteration 1": (data.cycle(arm, 3), data.cycle(arm)),
        }
        found += [Claim(text, where, Effect.of(*pair)) for text, pair in sides.items()]
    soft = Effect.of(data.cycle("soft", 3), data.cycle("hard", 3))
    return [*found, Claim("iteration 3, soft - hard", "soft labels, chrF", soft)]


def sdrrl() -> list[Claim]:
    sides = {"SDRRL - before": "before", "SDRRL - translate-then-SFT": "translate_sft"}
    sides |= {f"{text}: SDRRL - without": arm for arm, text in PARTS.items()}
    measures = {
        "questions, target language, points": ("de", "accuracy"),
        "completions, target language, chrF": ("de", "chrf"),
        "questions, source language, points": ("en", "accuracy"),
    }
    return [
        Claim(text, where, Effect.of(data.sdrrl("sdrrl", *measure), data.sdrrl(arm, *measure)))
        for text, arm in sides.items()
        for where, measure in measures.items()
    ]


def mt_llm() -> list[Claim]:
    sides = {
        "MT-LLM - the LLM alone": "LLM alone",
        "MT-LLM - translate-test with the same MT model": "translate-test",
        "MT-LLM - the MT encoder with a head": "MT encoder, frozen",
        "the first stage: MT-LLM - without": "MT-LLM, mse-unadapted",
        "self-distillation - labels": "MT-LLM, cross-entropy",
    }
    own = data.mt_llm("MT-LLM, mse")
    return [Claim(text, "de, cs, fr, points", Effect.of(own, data.mt_llm(system))) for text, system in sides.items()]


def floor() -> list[Claim]:
    """Of a real model. Lower is better there, so the differences are the other's minus the floor's."""
    found = []
    for study, student in (("near", "24 of 30 layers"), ("cpu", "12 of 30 layers")):
        frame = data.smollm2(study)
        for method, text in (("self_evolution", "no floor - floor 0.3"), ("forward_kd", "ForwardKD - floor 0.3")):
            for column, name in (("ce", "cross-entropy"), ("kl", "KL to the teacher")):
                effect = compare(frame, method, "self_evolution_floor", column=column)
                found.append(Claim(text, f"{student}, {name}", effect))
    return found


def demo() -> list[Claim]:
    frame, where = plane.demo(), "30 % wrong references, BLEU"
    pairs = {
        "floor 0.3 - ForwardKD": ("floor_0.3", "forward_kd"),
        "floor 0.3 - SFT": ("floor_0.3", "sft"),
        "ForwardKD - SFT": ("forward_kd", "sft"),
    }
    found = [Claim(text, where, compare(frame, *names)) for text, names in pairs.items()]
    starts = {"floor 0.3": "floor_0.3", "ForwardKD": "forward_kd", "SFT": "sft"}
    return [*found, *(Claim(f"{text} - the student before", where, gain(frame, name)) for text, name in starts.items())]


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
