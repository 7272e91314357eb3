"""Instructions in Alpaca's format, and the same tokenised rows made of them as of translations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from fused_kd.training.data.prompts import WITH_INPUT, WITHOUT_INPUT, PairDataset, tokenize_texts
from fused_kd.training.data.sources import BUILTIN, check_request, read_rows, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the data set's own two prompts; a response follows the colon directly
PROMPT_WITH_INPUT = WITH_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
PROMPT_WITHOUT_INPUT = WITHOUT_INPUT + "### Instruction:\n{instruction}\n\n### Response:"


class Instruction(NamedTuple):
    """A task, what it is about ("" for a task that stands alone), and the expected answer; lines are kept."""

    instruction: str
    input: str
    output: str

    def prompt(self) -> str:
        """Alpaca's prompt for it, up to ``### Response:``."""
        template = PROMPT_WITH_INPUT if self.input else PROMPT_WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


def load_instructions(
    source: str,
    split: str,
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> list[Instruction]:
    """Rows of ``instruction``, ``input`` and ``output`` as a list of `Instruction`.

    ``input`` may be missing, null or empty. White space around each text is dropped, white space within is
    kept.

    Args:
        source: a directory, a JSON file (lines or one array, plain or gzip) or a hub data set, as in
            `fused_kd.training.data.pairs.load_pairs`; a file without a split in its name (``alpaca_data.json``)
            is divided by a hash of instruction and input.
        split, limit, seed, skip_bad: as in `load_pairs`.

    Raises:
        ValueError: unknown source or split; a bad row (not JSON, no instruction or output, one that is no
            text or empty), with its file and line; no rows at all. TypeError: an argument of the wrong type.
    """
    check_request(source, split, limit, seed)
    if str(source) == BUILTIN:
        raise ValueError(f"source={BUILTIN!r}: the built-in corpus has translations, no instructions")
    rows = read_rows(source, split, _key)
    what = f"source={str(source)!r}, split={split!r}"
    return select(rows, _to_instruction, what, limit=limit, seed=seed, skip_bad=skip_bad)


def tokenize_instructions(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Iterable[Instruction],
    max_length: int,
    *,
    skip_long: bool = True,
) -> PairDataset:
    """Rows as of `fused_kd.training.data.prompts.tokenize_pairs`: loss on the output and EOS alone.

    An instruction whose prompt alone fills `max_length` is left out and counted in ``.skipped`` (default), or
    raises with ``skip_long=False``; a longer output is cut at its end.

    Raises:
        ValueError: a `max_length` below 2, a tokenizer without EOS, no row left.
    """
    instructions = list(instructions)
    prompts = [instruction.prompt() for instruction in instructions]
    outputs = [instruction.output for instruction in instructions]
    return tokenize_texts(tokenizer, prompts, outputs, max_length, skip_long=skip_long, items=instructions)


def _key(value: Any) -> str | None:
    parsed = _to_instruction(value)
    return None if isinstance(parsed, str) else f"{parsed.instruction}\n{parsed.input}"


def _to_instruction(value: Any) -> Instruction | str:
    """The instruction of a row, or what is wrong with it."""
    if not isinstance(value, dict):
        return f"expected an object with instruction, input and output, got {str(value)[:80]}"
    texts: dict[str, Any] = {name: value.get(name) for name in Instruction._fields}
    if texts["input"] is None:
        texts["input"] = ""
    for name, text in texts.items():
        if not isinstance(text, str):
            return f"no text for {name!r} (columns: {', '.join(map(str, value)) or 'none'})"
        texts[name] = text.strip()
        if not texts[name] and name != "input":
            return f"the text for {name!r} is empty"
    return Instruction(**texts)
