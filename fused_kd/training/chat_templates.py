"""Where the assistant's turns are in the text that a chat template makes of a conversation: found exactly, or not.

A template with ``{% generation %}`` marks says it itself. Of any other the text is compared with two texts of the same
template for each turn: the prompt with which generation of this turn begins (the messages before it, with the
generation prompt), and the conversation that ends in this turn. Where the whole begins with both, the turn is what lies
between, up to its end token; where it does not, as with templates that rewrite earlier turns, that is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from fused_kd.training.conversations import (
    ASSISTANT,
    Conversation,
    function_of,
    is_learnt,
    searched,
    with_text_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last"]

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKED = "as chat_template= one that has {% generation %} marks around what the assistant writes"
_ADVICE = f"take turns='last' (loss on the last turn alone, a row for each turn), or {_MARKED}"
_THINKING = (
    f"take {_MARKED}, or give the row chat_template_kwargs with which both are alike (enable_thinking, for templates "
    "that have it)"
)
# two answers without a common beginning or end
_PROBES = ("qzAxq", "vyBwv")
# templates may write these far from where they are among the turns
_ELSEWHERE = ("system", "developer")


class Chat(NamedTuple):
    """A conversation as text, and the spans of it, from a character to before another, that carry loss."""

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A tokenizer's chat template, and what of its text the assistant has to write.

    Args:
        tokenizer: of `transformers`.
        template: a Jinja template, or the path of a file that has one; None (default) takes the tokenizer's own.
        turns: ``"all"`` (default): every assistant turn carries loss; ``"last"``: the last of each row alone.

    Raises:
        ValueError: a tokenizer without a template where none is given, an unknown `turns`, a file that is not there.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | Path | None = None, turns: Turns = "all"
    ) -> None:
        if turns not in ("all", "last"):
            raise ValueError(f"turns={turns!r}: expected 'all' or 'last'")
        self.tokenizer, self.turns = tokenizer, turns
        self.template = None if template is None else _template_text(template)
        if self.template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat "
                "template: give chat_template= a Jinja file (one is in the folder of the same model's chat or instruct "
                "version), take that version's tokenizer, or write the rows as prompt and completion"
            )
        self._special = _special_texts(tokenizer)
        self._end: tuple[str, str] | None = None
        self._control: dict[str, re.Pattern[str]] = {}

    def chat(self, conversation: Conversation) -> Chat:
        """The text of a conversation and the spans that carry loss; their ends take the turn's end token in.

        Raises:
            ValueError: a special token of the template in what a turn says, a template that does not take the
                conversation or leaves its tools out, or a turn that cannot be found; all name the turn.
        """
        try:
            return self._chat(conversation)
        except ValueError:
            if not any(message.get("tool_calls") for message in conversation.messages):
                raise
            with suppress(ValueError):  # some templates take the arguments of calls as JSON text
                return self._chat(with_text_arguments(conversation))
            raise

    def _chat(self, conversation: Conversation) -> Chat:
        self._check_contents(conversation)
        whole = conversation.messages
        if _MARKS.search(self._source(conversation)):
            text, spans = self._marked(conversation)
        else:
            text = self._render(conversation, whole, f"turn {len(whole)}")
            spans = self._between(conversation, text)
        self._check_tools(conversation, text)
        return Chat(text, spans)

    def _marked(self, conversation: Conversation) -> Chat:
        """By the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, **conversation.options}
        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation.messages],
                tools=cast(Any, conversation.tools),
                chat_template=self._source(conversation),
                return_assistant_tokens_mask=True,
                **variables,
            )
        except Exception as error:
            raise ValueError(_refusal(error, f"turn {len(conversation.messages)}")) from error
        (text,), (found,) = rendered
        spans = [(begin, end) for begin, end in found if end > begin]
        wanted = self._wanted(conversation)
        if self.turns == "last" or not all(is_learnt(m) for m in conversation.messages if m["role"] == ASSISTANT):
            of_turns = self._spans_of_turns(conversation, text, spans)
            if bare := [number for number in wanted if not of_turns[number]]:
                raise ValueError(
                    f"turn {bare[0] + 1} (assistant): the chat template's {{% generation %}} marks have no text of it "
                    "between them"
                )
            spans = [span for number in wanted for span in of_turns[number]]
        if conversation.given:
            before = self._render(conversation, conversation.messages[: conversation.given], "the prompt")
            if not text.startswith(before):
                raise ValueError(f"the completion: {_rewritten(text, before)}; {_ADVICE}")
            spans = [span for span in spans if span[0] >= len(before)]
        if not spans:
            raise ValueError(
                "the chat template's {% generation %} marks have no text of this conversation between them"
            )
        return Chat(text, spans)

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The messages that carry loss."""
        learnt = [n for n, m in enumerate(conversation.messages) if is_learnt(m) and n >= conversation.given]
        return learnt[-1:] if self.turns == "last" else learnt

    def _spans_of_turns(
        self, conversation: Conversation, text: str, spans: Sequence[tuple[int, int]]
    ) -> dict[int, list[tuple[int, int]]]:
        """The marked spans of each assistant turn: those up to what another role says next."""
        found: dict[int, list[tuple[int, int]]] = {}
        rest, together = list(spans), list[int]()
        for number, message in enumerate([*conversation.messages, None]):
            if message is not None and message["role"] == ASSISTANT:
                together.append(number)
                continue
            end = len(text) if message is None else self._place_of(conversation, number, text) if together else None
            if end is None:
                continue
            here = [span for span in rest if span[0] < end]
            rest = rest[len(here) :]
            if len(together) > 1 and len(here) != len(together):
                raise ValueError(
                    f"turns {together[0] + 1} to {together[-1] + 1}: the chat template marks {len(here)} texts in "
                    f"{len(together)} assistant turns, so that they cannot be told apart"
                )
            found |= dict(zip(together, [here] if len(together) == 1 else [[span] for span in here], strict=True))
            together = []
        return found

    def _place_of(self, conversation: Conversation, number: int, text: str) -> int | None:
        """A character of `text` that the content of a user's or tool's message changes, the first one."""
        messages = list(conversation.messages)
        content = messages[number].get("content", "")
        if messages[number]["role"] in _ELSEWHERE or not isinstance(content, str):
            return None
        # templates look at how a content begins and ends
        middle = len(content) // 2
        messages[number] = {**messages[number], "content": content[:middle] + _PROBES[0] + content[middle:]}
        with suppress(ValueError):
            changed = self._render(conversation, messages, "")
            return None if changed == text else _common(changed, text)
        return None

    def _between(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Each turn as what comes after its prompt, in `text`, the whole conversation."""
        messages = conversation.messages
        spans = []
        for number in self._wanted(conversation):
            turn = f"turn {number + 1} (assistant)"
            if number == 0:
                raise ValueError(
                    f"{turn}: the conversation begins with it, so that it has no prompt: add a user or system turn "
                    "before it, or give chat_template= one with {% generation %} marks"
                )
            prompt = self._render(conversation, messages[:number], f"the prompt of {turn}", generation=True)
            last = number == len(messages) - 1
            ended = text if last else self._render(conversation, messages[: number + 1], turn)
            if not ended.startswith(prompt):
                raise ValueError(
                    f"{turn}: the prompt with which its generation begins is not what the chat template writes before "
                    f"it: {_rewritten(ended, prompt)}; {_THINKING}"
                )
            end = self._end_of(conversation, number, ended, len(prompt), turn)
            if not text.startswith(ended[:end]):
                raise ValueError(
                    f"{turn}: the chat template rewrites it when more turns follow: {_rewritten(text, ended[:end])}; "
                    f"{_ADVICE}"
                )
            spans.append((len(prompt), end))
        return spans

    def _end_of(self, conversation: Conversation, number: int, ended: str, begin: int, turn: str) -> int:
        """Behind the end token of a turn that is the last of `ended` and begins at `begin`."""
        for learn in (False, True):
            if learn or self._end is None:
                self._end = self._learn_end(conversation, number, turn)
            token, rest = self._end
            if ended.endswith(token + rest) and len(ended) - len(rest) > begin:
                return len(ended) - len(rest)
        raise ValueError(f"{turn}: the chat template does not end it in {token!r}, as other turns; {_ADVICE}")

    def _learn_end(self, conversation: Conversation, number: int, turn: str) -> tuple[str, str]:
        """The end token behind an answer, whatever the answer is, and what follows that token.

        Special tokens one after the other are one end, up to EOS where that is among them.
        """
        before = conversation.messages[:number]
        first, second = (
            self._render(conversation, [*before, {"role": ASSISTANT, "content": probe}], turn) for probe in _PROBES
        )
        if _PROBES[0] not in first:
            raise ValueError(f"{turn}: the chat template leaves the text of an answer out")
        behind = first[len(first) - _common(first[::-1], second[::-1]) :]
        found = re.search(f"(?:{_any_of(self._special)})+", behind) if self._special else None
        if found is None:
            raise ValueError(
                f"{turn}: the chat template puts no special token behind an answer (only {behind!r}), so that a model "
                "would not learn where to stop: write the tokenizer's EOS there in the template ({{ eos_token }}), or "
                f"take {_MARKED}"
            )
        eos = self.tokenizer.eos_token
        end = found[0].partition(eos)[0] + eos if eos and eos in found[0] else found[0]
        return end, behind[found.start() + len(end) :]

    def _source(self, conversation: Conversation) -> str:
        """The Jinja text; tokenizers may have one more for conversations with tools."""
        found: str = self.tokenizer.get_chat_template(self.template, conversation.tools)
        return found

    def _render(
        self, conversation: Conversation, messages: Sequence[dict[str, Any]], what: str, generation: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=cast(Any, conversation.tools),
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
                **conversation.options,
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(_refusal(error, what)) from error
        return str(text)

    def _check_contents(self, conversation: Conversation) -> None:
        """Raise for text that would close its turn, or open another, as if the template had written it."""
        source = self._source(conversation)
        if source not in self._control:
            written = source + self._written(conversation) + "".join(_named_tokens(self.tokenizer))
            control = [token for token in self._special if token in written]
            self._control[source] = re.compile(_any_of(control) if control else r"(?!)")
        beside = {"tools": conversation.tools or [], "chat_template_kwargs": conversation.options}
        texts = {f"turn {n} ({m['role']})": searched(m) for n, m in enumerate(conversation.messages, start=1)}
        texts |= {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in beside.items()}
        for where, text in texts.items():
            if found := self._control[source].search(text):
                raise ValueError(
                    f"{where}: its text has the special token {found[0]!r}, which would be read as the end or the "
                    "beginning of a turn: take it out, or skip such rows (skip_bad)"
                )

    def _written(self, conversation: Conversation) -> str:
        """What the template writes around plain turns of those roles that it takes."""
        written = ""
        for roles in (("user", ASSISTANT), ("system", "user", ASSISTANT), ("user", ASSISTANT, "tool", ASSISTANT)):
            turns = [{"role": role, "content": _PROBES[0]} for role in roles]
            with suppress(ValueError):
                written += self._render(conversation, turns, "")
        return written

    def _check_tools(self, conversation: Conversation, text: str) -> None:
        """Raise for a template that leaves out tools or calls, as many do without a word."""
        calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
        for what, items in (("tools", conversation.tools or ()), ("tool_calls", calls)):
            for item in items:
                name = function_of(item).get("name")
                if isinstance(name, str) and name not in text:
                    raise ValueError(f"the chat template leaves {what} out ({name!r}): it must be one that takes tools")


def _template_text(template: str | Path) -> str:
    text = str(template)
    if isinstance(template, str) and ("{{" in text or "{%" in text):
        return text
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template={text!r}: expected a Jinja template, or a file that has one")
    return path.read_text(encoding="utf-8")


def _named_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    names = ("bos_token", "eos_token", "pad_token")
    return [token for name in names if (token := getattr(tokenizer, name, None))]


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer reads as special tokens, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if token.special} | {str(t) for t in tokenizer.all_special_tokens}
    return sorted(filter(str.strip, found), key=lambda text: (-len(text), text))


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts))


def _common(first: str, second: str) -> int:
    """The length of the common beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _rewritten(text: str, expected: str) -> str:
    """Where the two differ, for a message."""
    same = _common(text, expected)
    before = expected[max(0, same - 20) : same]
    return f"expected {expected[same : same + 40]!r} after {before!r}, got {text[same : same + 40]!r}"


def _refusal(error: Exception, what: str) -> str:
    kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
    hint = ""
    if "'content'" in str(error):
        hint = "; of a turn with content null, such as one that calls a tool: does this template take tool calls?"
    return f"{what}: the chat template does not take the conversation: {kind}{error}{hint}"
