"""Rows of data sets as conversations: what forms are read, and what is said about the others."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fused_kd.training.conversations import Conversation, to_conversation

from .chat_families import say


def test_sharegpt_and_columns_beside() -> None:
    spoken = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    found = to_conversation({"conversations": spoken, "system": "Be brief."})
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert isinstance(found, Conversation) and found.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    assert to_conversation({"messages": json.dumps(found.messages)}) == found


BAD_ROWS = [
    ({"text": "a"}, "expected messages or conversations, a list of turns, got the columns text"),
    ({"messages": []}, "messages: expected a list of turns"),
    ({"messages": "hello"}, "messages: expected a list of turns, got hello"),
    ({"messages": ["hello"]}, "turn 1: expected an object with role and content, got hello"),
    ({"messages": [{"content": "a"}]}, "turn 1: expected a role, got content"),
    ({"messages": [{"role": "user"}]}, "turn 1: user: no content"),
    ({"messages": [{"role": "user", "content": 3}]}, "turn 1: user: expected a content of text, got 3"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "a part of the content is 'image': expected texts",
    ),
    ({"messages": say("a")}, r"messages has no assistant turn, so nothing carries loss (roles: user)"),
    ({"messages": say("a", " \n")}, "turn 2: assistant: the turn is empty"),
    (
        {"messages": [*say("a", "b"), {"role": "assistant", "tool_calls": [{}]}]},
        "turn 3: tool_calls: expected functions",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
        "user: expected a weight of 0 or 1, and train",
    ),
    ({"messages": say("a", "b"), "tools": "f"}, "tools: expected a list of objects, or its JSON text, got f"),
    ({"messages": say("a", "b"), "chat_template_kwargs": "x"}, "chat_template_kwargs: expected an object"),
    ({"messages": say("a", "\ud83d")}, "the text is a lone surrogate 0xd83d"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "turn 1: from='alien': expected one of human, user"),
    ([], "expected messages or conversations, a list of turns, got []"),
]


@pytest.mark.parametrize(("value", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_what_is_wrong_with_a_row(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_conversation(value)
