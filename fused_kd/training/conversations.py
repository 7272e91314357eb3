"""Conversations of the forms in which data sets have them, as the messages that chat templates take.

OpenAI's and TRL's ``messages`` (``role``, ``content``, ``tool_calls``), ShareGPT's ``conversations`` (``from``,
``value``) and TRL's ``prompt`` and ``completion``. Every function gives what is wrong with a row as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fused_kd.training.files import text_fault

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


def to_conversation(value: Any) -> Conversation | str:
    """The conversation of a row of ``messages`` or ``conversations``, or what is wrong with it.

    What follows the last assistant turn is left out, as nothing is learnt from it. ``system`` (a text), ``tools`` (a
    list, or its JSON text) and ``chat_template_kwargs`` (a dict, or its JSON text) may be beside the messages.
    """
    name = _message_column(value)
    if name is None:
        return f"expected messages or conversations, a list of turns, got {_columns(value)}"
    return _conversation(value, value[name], name)


def to_completion(value: Any) -> Conversation | Completion | str:
    """A row of ``prompt`` and ``completion``, both texts or both lists of messages; or what is wrong with it."""
    if not isinstance(value, dict) or not {"prompt", "completion"} <= value.keys():
        return f"expected prompt and completion, got {_columns(value)}"
    prompt, completion = (_turns_or_text(value[name]) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            return "the completion is empty"
        fault = text_fault(prompt + completion)
        return f"the text is {fault}" if fault else Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        if not prompt or not completion:
            return f"the {'completion' if prompt else 'prompt'} has no messages"
        return _conversation(value, [*prompt, *completion], "prompt and completion", len(prompt))
    return (
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
    messages = _messages(turns) if isinstance(turns, list) else ""
    texts = [m.get("content", "") for m in messages if m["role"] != "system"] if isinstance(messages, list) else []
    return str(texts[0]) if texts else None


def is_learnt(message: dict[str, Any]) -> bool:
    """Whether it is an assistant's turn that is not left out of the loss by ``weight`` 0 or ``train`` false."""
    return bool(message["role"] == ASSISTANT and message.get("weight", 1) and message.get("train", True))


def texts_of(message: dict[str, Any]) -> str:
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


def _columns(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)[:80]
    return f"the columns {', '.join(map(str, value))}" if value else "no columns"


def _conversation(value: dict[str, Any], turns: Any, name: str, given: int = 0) -> Conversation | str:
    turns = _from_json(turns)
    if not isinstance(turns, list) or not turns:
        return f"{name}: expected a list of turns, got {str(turns)[:80] or 'an empty text'}"
    messages = _messages(turns)
    if isinstance(messages, str):
        return messages
    system = value.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages, given = [{"role": "system", "content": system}, *messages], given + 1 if given else 0
    last = max((n for n, message in enumerate(messages) if is_learnt(message)), default=-1)
    if last < given:
        where = "the completion" if given else name
        return f"{where} has no assistant turn, so nothing carries loss (roles: {', '.join(_roles(messages))})"
    tools, options = _from_json(value.get("tools")), _from_json(value.get("chat_template_kwargs"))
    if isinstance(tools, list):
        tools = [_from_json(tool) for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return f"tools: expected a list of objects, or its JSON text, got {str(tools)[:80]}"
    if options and not isinstance(options, dict):
        return f"chat_template_kwargs: expected an object, or its JSON text, got {str(options)[:80]}"
    conversation = Conversation(messages[: last + 1], tools or None, options or {}, given)
    fault = text_fault(json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str))
    return f"the text is {fault}" if fault else conversation


def _roles(messages: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(message["role"] for message in messages))


def _messages(turns: Sequence[Any]) -> list[dict[str, Any]] | str:
    messages = []
    for number, turn in enumerate(turns, start=1):
        message = _message(turn)
        if isinstance(message, str):
            return f"turn {number}: {message}"
        messages.append(message)
    return messages


def _message(turn: Any) -> dict[str, Any] | str:
    """A message as templates take it, or what is wrong with the turn."""
    if not isinstance(turn, dict):
        return f"expected an object with role and content, got {str(turn)[:80]}"
    message = {name: entry for name, entry in turn.items() if entry is not None}
    if "from" in message and "role" not in message:
        spoken = _from_sharegpt(message)
        if isinstance(spoken, str):
            return spoken
        message = spoken
    role = message.get("role")
    if not isinstance(role, str) or not role:
        return f"expected a role, got {', '.join(turn) or 'nothing'}"
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1) or train not in (True, False):
        return f"{role}: expected a weight of 0 or 1, and train true or false, got {weight!r} and {train!r}"
    calls = _calls(message.get("tool_calls"))
    if isinstance(calls, str):
        return calls
    message.pop("tool_calls", None)
    content = _content(message.pop("content", None))
    if isinstance(content, _Fault):
        return f"{role}: {content}"
    if content is None and not calls:
        return f"{role}: no content"
    if role == ASSISTANT and not (content or "").strip() and not calls:
        return "assistant: the turn is empty"
    return {**message, **({} if content is None else {"content": content}), **({"tool_calls": calls} if calls else {})}


class _Fault(str):
    """What is wrong, where a text could also be what is right."""

    __slots__ = ()


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any] | str:
    speaker, value = message["from"], message.get("value")
    if speaker not in _SPEAKERS:
        return f"from={speaker!r}: expected one of {', '.join(_SPEAKERS)}"
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": value}
    calls = _from_json(value)
    return {"role": ASSISTANT, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _content(content: Any) -> str | None:
    """The text of a content, which may be in parts; None for none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        return _Fault(f"expected a content of text, got {str(content)[:80]}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return _Fault(f"a part of the content is {kind!r}: expected texts only")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any) -> list[dict[str, Any]] | str:
    """Tool calls, each a function with a name and arguments that are an object, as templates expect."""
    calls = _from_json(calls)
    if not calls:
        return []
    if not isinstance(calls, list):
        return f"tool_calls: expected a list, got {str(calls)[:80]}"
    found = []
    for call in calls:
        function = function_of(call)
        if not isinstance(function.get("name"), str):
            return f"tool_calls: expected functions with a name, got {str(call)[:80]}"
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
