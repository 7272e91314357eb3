"""How good the base's candidates are, and which scorer finds them: what an iteration can give, before any training.

    python examples/cycle_distill/probe.py --preset tiny --output runs/cycle --candidates 16

The sentences are those of the validation split; their references serve the scores alone. ``probe.json`` in --output
has chrF and BLEU of greedy decoding, of a sample, of each scorer's choice, and of the best by the reference (oracle).
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent))

from candidates import SCORERS, chrf_matrix, summed
from cycle_distill import DECODED_BY, HERE, Cycle, CycleDistill
from cycle_report import others
from translations import Filters, Maker, row_of, truncated

from fused_kd.training.generate import Generations, generate_to
from fused_kd.training.score import score
from fused_kd.training.script import parse, run_script
from fused_kd.training.stage import read_lines, write_json


@dataclass
class Options:
    """How the script runs."""

    output: str = "runs/cycle_probe"
    stages: str | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])


def measure(cycle: Cycle, seed: int, temperature: float) -> dict[str, Any]:
    """chrF on the validation split of every way to choose, with the candidates' number and temperature."""
    config, pairs = cycle.config, cycle.texts.valid
    model, references, n = cycle.base(seed), [pair.target for pair in pairs], config.candidates
    prompts = cycle.prompts(pairs)
    decoding = replace(cycle.decoding, temperature=temperature, seed=seed)
    repeated = [prompt for prompt in prompts for _ in range(n)]

    def sample(folder: Path) -> None:
        generate_to(folder, cycle.load(model), cycle.tokenizer, repeated, decoding, progress=False)

    about = config.some(*DECODED_BY) | {"candidates": n, "temperature": temperature, "seed": seed}
    made = Generations(cycle.stages(f"probe-seed{seed}", sample, about, needs=[cycle.texts_stage, model]))
    maker = Maker(cycle.tokenizer, config.direction, cycle.filters, config.max_length)
    found: dict[str, Any] = {"seed": seed, "candidates": n, "temperature": temperature, "sentences": len(pairs)}
    groups = []
    for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        rows = [row_of(made[place], prompt, pair, maker) for place in range(index * n, (index + 1) * n)]
        groups.append([row for row in rows if "rule" not in row])
    found["passed"] = sum(map(len, groups)) / len(made)
    first = [truncated(made[index * n].text, cycle.filters.markers) for index in range(len(pairs))]
    some = [index for index, group in enumerate(groups) if group]
    if not some:
        raise ValueError(f"{model.name}: none of its {len(made)} translations passed the filters")
    rows = [groups[index] for index in some]

    def chosen(scores: list[list[float]]) -> dict[str, float]:
        texts = list(first)
        for index, group, each in zip(some, rows, scores, strict=True):
            texts[index] = group[max(range(len(group)), key=each.__getitem__)]["text"]
        return measured(texts)

    def measured(texts: list[str]) -> dict[str, float]:
        made = score(texts, references)
        return {"chrf": made.chrf, "bleu": made.bleu, **others(texts, references)}

    found["greedy"] = measured(read_lines(cycle.base_scores(seed) / "valid.txt"))
    found["sample"] = measured(first)
    possible = [name for name in SCORERS if name != "round_trip" or config.both_ways]
    parts = {name: cycle.score_by(name, model, seed, rows) for name in possible}
    for count in range(1, len(possible) + 1):
        for names in itertools.combinations(possible, count):
            found[" + ".join(names)] = chosen(summed([parts[name] for name in names]))
    to_reference = [
        chrf_matrix([*(row["text"] for row in group), references[index]])[:-1, -1].tolist()
        for index, group in zip(some, rows, strict=True)
    ]
    found["oracle"] = chosen(to_reference)
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    config, filters, options = parse((CycleDistill, Filters, Options), argv, configs=HERE)
    cycle = Cycle(config, filters, options.stages or options.output, options.output)
    cycle.check()
    found = []
    for seed in config.seeds:
        for temperature in options.temperatures:
            found.append(measure(cycle, seed, temperature))
            write_json(Path(options.output) / "probe.json", found)
            cycle.console.print(found[-1])
    return found


if __name__ == "__main__":
    run_script(main)
