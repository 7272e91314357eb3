"""Conversations of the forms in which data sets have them, as the messages that chat templates take.

OpenAI's and TRL's ``messages`` (``role``, ``content``, ``tool_calls``), ShareGPT's ``conversations`` (``from``,
``value``) and TRL's ``prompt`` and ``completion``. What is wrong with a row is a ``ValueError``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fused_kd.training.files import columns_of, text_fault

ASSISTANT = "assistant"
MESSAGE_COLUMNS = ("messages", "conversations")

# ShareGPT's names of who speaks
_SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT,
    "model": ASSISTANT, "bot": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": ASSISTANT,
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: dicts of ``role`` and ``content`` (a text), and what else the row has; no entry is None. The last is
            an assistant's. One with ``weight`` 0 (OpenAI's name) or ``train`` false carries no loss.
        tools: descriptions of the tools that the assistant may call, or None.
        options: further variables of the template.
        given: so many first messages are a prompt, whose assistant turns carry no loss.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    given: int = 0


@dataclass(frozen=True)
class Completion:
    """Two texts: the second, with the EOS behind it, carries the loss."""

    prompt: str
    completion: str


def to_conversation(value: Any) -> Conversation:
    """The conversation of a row of ``messages`` or ``conversations``. Raises ``ValueError`` for a row without one.

    What follows the last assistant turn is left out, as nothing is learnt from it. ``system`` (a text), ``tools`` (a
    list, or its JSON text) and ``chat_template_kwargs`` (a dict, or its JSON text) may be beside the messages.
    """
    name = _message_column(value)
    if name is None:
        raise ValueError(f"expected messages or conversations, a list of turns, got {columns_of(value)}")
    return _conversation(value, value[name], name)


def to_completion(value: Any) -> Conversation | Completion:
    """A row of ``prompt`` and ``completion``, texts or lists of messages. Raises ``ValueError`` for others."""
    if not isinstance(value, dict) or not {"prompt", "completion"} <= value.keys():
        raise ValueError(f"expected prompt and completion, got {columns_of(value)}")
    prompt, completion = (_turns_or_text(value[name]) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ValueError("the completion is empty")
        _check_text(prompt + completion)
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        if not prompt or not completion:
            raise ValueError(f"the {'completion' if prompt else 'prompt'} has no messages")
        return _conversation(value, [*prompt, *completion], "prompt and completion", len(prompt))
    raise ValueError(
        "expected prompt and completion to be both texts or both lists of messages, got "
        f"{type(value['prompt']).__name__} and {type(value['completion']).__name__}"
    )


def first_question(value: Any) -> str | None:
    """The text that decides on the part of a row in a file without splits: what is said first, the system apart."""
    if not isinstance(value, dict):
        return None
    name = _message_column(value)
    turns = _turns_or_text(value.get("prompt")) if name is None else _from_json(value[name])
    if isinstance(turns, str):
        return turns
    try:
        messages = _messages(turns) if isinstance(turns, list) else []
    except ValueError:
        return None
    return next((str(m.get("content", "")) for m in messages if m["role"] != "system"), None)


def is_learnt(message: dict[str, Any]) -> bool:
    """Whether it is an assistant's turn that is not left out of the loss by ``weight`` 0 or ``train`` false."""
    return bool(message["role"] == ASSISTANT and message.get("weight", 1) and message.get("train", True))


def searched(message: dict[str, Any]) -> str:
    """All that a message puts into the template, as one text, for searches."""
    rest = {name: entry for name, entry in message.items() if name != "content"}
    return str(message.get("content", "")) + json.dumps(rest, ensure_ascii=False)


def function_of(call: Any) -> dict[str, Any]:
    """The function of a tool call or of a tool's description, which may be wrapped."""
    inner = call.get("function") if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else call if isinstance(call, dict) else {}


def with_text_arguments(conversation: Conversation) -> Conversation:
    """The same, with the arguments of tool calls as JSON text."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    messages = [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


def _message_column(value: Any) -> str | None:
    return next((n for n in MESSAGE_COLUMNS if isinstance(value, dict) and value.get(n) is not None), None)


def _check_text(text: str) -> None:
    if fault := text_fault(text):
        raise ValueError(f"the text is {fault}")


def _conversation(value: dict[str, Any], turns: Any, name: str, given: int = 0) -> Conversation:
    turns = _from_json(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name}: expected a list of turns, got {str(turns)[:80] or 'an empty text'}")
    messages = _messages(turns)
    system = value.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages, given = [{"role": "system", "content": system}, *messages], given + 1 if given else 0
    last = max((n for n, message in enumerate(messages) if is_learnt(message)), default=-1)
    if last < given:
        where, roles = "the completion" if given else name, ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise ValueError(f"{where} has no assistant turn, so nothing carries loss (roles: {roles})")
    tools, options = _from_json(value.get("tools")), _from_json(value.get("chat_template_kwargs"))
    if isinstance(tools, list):
        tools = [_from_json(tool) for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools: expected a list of objects, or its JSON text, got {str(tools)[:80]}")
    if options and not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs: expected an object, or its JSON text, got {str(options)[:80]}")
    conversation = Conversation(messages[: last + 1], tools or None, options or {}, given)
    _check_text(json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str))
    return conversation


def _messages(turns: Sequence[Any]) -> list[dict[str, Any]]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
    return messages


def _message(turn: Any) -> dict[str, Any]:
    """A message as templates take it."""
    if not isinstance(turn, dict):
        raise ValueError(f"expected an object with role and content, got {str(turn)[:80]}")
    message = {name: entry for name, entry in turn.items() if entry is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"expected a role, got {', '.join(turn) or 'nothing'}")
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1) or train not in (True, False):
        raise ValueError(f"{role}: expected a weight of 0 or 1, and train true or false, got {weight!r} and {train!r}")
    calls = _calls(message.pop("tool_calls", None))
    content = _content(role, message.pop("content", None))
    if content is None and not calls:
        raise ValueError(f"{role}: no content")
    if role == ASSISTANT and not (content or "").strip() and not calls:
        raise ValueError("assistant: the turn is empty")
    return {**message, **({} if content is None else {"content": content}), **({"tool_calls": calls} if calls else {})}


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    if speaker not in _SPEAKERS:
        raise ValueError(f"from={speaker!r}: expected one of {', '.join(_SPEAKERS)}")
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": value}
    calls = _from_json(value)
    return {"role": ASSISTANT, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _content(role: str, content: Any) -> str | None:
    """The text of a content, which may be in parts; None for none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{role}: expected a content of text, got {str(content)[:80]}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{role}: a part of the content is {kind!r}: expected texts only")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls, each a function with a name and arguments that are an object, as templates expect."""
    calls = _from_json(calls)
    if not calls:
        return []
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls: expected a list, got {str(calls)[:80]}")
    found = []
    for call in calls:
        function = function_of(call)
        if not isinstance(function.get("name"), str):
            raise ValueError(f"tool_calls: expected functions with a name, got {str(call)[:80]}")
        function = {**function, "arguments": _from_json(function.get("arguments", {}))}
        rest = {name: entry for name, entry in call.items() if name not in ("function", *function)}
        found.append({"type": "function", **rest, "function": function})
    return found


def _turns_or_text(value: Any) -> Any:
    """Messages that are written as JSON text, as a list; a text that is any other JSON stays a text."""
    found = _from_json(value)
    return found if isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found) else value


def _from_json(value: Any) -> Any:
    """A list or object that is written as JSON text, as it is; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list | dict) else value
    return value
