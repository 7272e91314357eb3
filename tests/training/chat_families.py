"""Chat templates in the manner of each family of models, short, with what of them an assistant has to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .byte_level import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = [
    "What is a cat?",
    "An animal with four legs.",
    "And a dog?",
    "Another one.",
    "Be brief.",
    "user assistant system",
]


@dataclass(frozen=True)
class Family:
    """A template; `written` is what the assistant writes for a content, by hand, with {} for it."""

    template: str
    special: Sequence[str]
    written: str
    eos: str
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(WORDS)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [t for t in self.special if t not in ("<s>", "</s>")]}
        )
        tokenizer.eos_token = self.eos
        tokenizer.chat_template = self.template
        return tokenizer


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"), "{}<|im_end|>", "<|im_end|>",
    ),
    "llama-3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "{}<|eot_id|>", "<|eot_id|>",
    ),
    "llama-2": Family(
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{{ (system if loop.first else '') + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), " {} </s>", "</s>",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "{}</s>", "</s>", system=False,
    ),
    "gemma": Family(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"), "{}<end_of_turn>", "<end_of_turn>", system=False,
    ),
    "phi": Family(  # its EOS is at the end of everything, and no turn's end
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "{}<|end|>", "</s>",
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("</s>",), "{}</s>", "</s>",
    ),
    "deepseek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), "{}<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    ),
    "command": Family(  # two special tokens end a turn
        "{% for m in messages %}<|START|>{{ m.role }}<|BEGIN|>{{ m.content }}<|STOP|><|END|>{% endfor %}"
        "{% if add_generation_prompt %}<|START|>assistant<|BEGIN|>{% endif %}",
        ("<|START|>", "<|BEGIN|>", "<|STOP|>", "<|END|>"), "{}<|STOP|><|END|>", "<|END|>",
    ),
}  # fmt: skip

# The thinking of all but the last answer is dropped, and an empty one is put before the last.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
