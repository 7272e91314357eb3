"""Prompts with examples: one template renders the prompts of generation and of training, so they cannot differ."""

from __future__ import annotations

from collections.abc import Sequence

from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import PROMPTS, PromptTemplate

MAX_SHOTS = 4
# the parts of the public code's prompt; the response begins on a line of its own, as its first token would otherwise
# depend on whether the tokenizer joins it to the colon
CYCLE_PROMPTS = {
    "cycle_distill": PromptTemplate(
        "cycle_distill",
        "### Instruction: Translate the text from {source_language} to {target_language}.\n"
        "### Input: {source_language} Text: {source}\n"
        "### Response:\n",
    )
}


def get_template(name: str) -> PromptTemplate:
    """A template by name, of ``CYCLE_PROMPTS`` or ``fused_kd.training.data.prompts.PROMPTS``; ``ValueError`` else."""
    known = {**PROMPTS, **CYCLE_PROMPTS}
    if name not in known:
        raise ValueError(f"prompt {name!r} is unknown: expected one of {', '.join(known)}")
    return known[name]


def with_examples(template: PromptTemplate, examples: Sequence[Pair], direction: str) -> PromptTemplate:
    """The template with solved examples before it, as plain text; with none it is returned as it is.

    Raises:
        ValueError: more than ``MAX_SHOTS`` examples, a bad direction.
    """
    if len(examples) > MAX_SHOTS:
        raise ValueError(f"examples: expected at most {MAX_SHOTS}, got {len(examples)}")
    if not examples:
        return template
    between = "\n\n" if "\n\n" in template.template else "\n"
    solved = [template.render(pair.source, direction) + pair.target for pair in examples]
    shown = "".join(text.replace("{", "{{").replace("}", "}}") + between for text in solved)
    return PromptTemplate(f"{template.name}-{len(examples)}-shot", shown + template.template)
