"""A small draft that writes a part of its target's vocabulary, and how good it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import fused_kd as fk
from fused_kd.integrations.transformers import hidden_states, lm_head_of, rows_of
from fused_kd.training.collate import Collator
from fused_kd.training.prompts import Rows


class Draft(LlamaForCausalLM):
    """A Llama that reads ``config.vocab_size`` ids and writes ``config.draft_vocab_size`` of them, its ``columns``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("columns", torch.arange(config.draft_vocab_size))
        self.post_init()


class Drafter(Draft):
    """A trained :class:`Draft` to generate with: what it cannot write has the logit -inf."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda head, inputs, logits: self.widened(logits))

    def widened(self, logits: Tensor) -> Tensor:
        """(..., V of the target), of (..., V of the draft)."""
        wide = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return wide.index_copy_(-1, self.columns, logits)


def new_draft(target: Any, columns: Tensor, hidden: int | None, layers: int, seed: int) -> Draft:
    """Random, ``hidden`` wide (even; None: half of the target), with the target's special tokens."""
    of = target.config.get_text_config()
    hidden = hidden or max(of.hidden_size // 4, 1) * 2
    # rotary embeddings turn pairs within a head
    heads = next(count for count in range(max(1, hidden // 32), 0, -1) if hidden % (2 * count) == 0)
    ids = {name: getattr(of, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=rows_of(target.get_output_embeddings().weight), draft_vocab_size=len(columns), hidden_size=hidden,
        intermediate_size=int(2.75 * hidden), num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=of.max_position_embeddings, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = Draft(config)
    draft.columns.copy_(columns)
    return draft


def batches(target: Any, rows: Rows) -> Iterator[tuple[dict[str, Tensor], Tensor, fk.LMHead]]:
    """Inputs, labels that are 0 where a token counts and -100 elsewhere, and the target's head on its hidden states."""
    for start in range(0, len(rows), 32):
        batch = {name: x.to(target.device) for name, x in Collator(0)(rows.rows[start : start + 32]).items()}
        labels = batch.pop("labels").clamp(max=0)
        yield batch, labels, lm_head_of(target, hidden_states(target, **batch))


@torch.no_grad()
def kept_share(draft: Draft, target: Any, rows: Rows) -> float:
    """The mean of sum min(p, q) over the held-out responses: what speculative sampling keeps of the drafted tokens.

    p is of all of the target's columns, of which the draft's are a part.
    """
    kept = tokens = 0.0
    for batch, labels, head_t in batches(target, rows):
        head_s = lm_head_of(draft, hidden_states(draft, **batch))
        head_t = replace(head_t, columns=draft.columns, tail="bucket")
        distance = fk.kd_loss(head_s, head_t, labels, fk.TotalVariation(), shift=True, reduction="sum").loss
        count = int((labels[:, 1:] == 0).sum())
        kept, tokens = kept + count - float(distance), tokens + count
    return kept / tokens


@torch.no_grad()
def reachable_share(mapped: fk.VocabMap, target: Any, rows: Rows) -> float:
    """:func:`kept_share` of the best draft with this map: what the target gives to tokens that it can write."""
    found = [mapped.mass(head)[:, :-1][labels[:, 1:] == 0] for _, labels, head in batches(target, rows)]
    return float(torch.cat(found).mean())


def continuations(target: Any, prompts: list[list[int]], longest: int, draft: Any = None, drafted: int = 0) -> dict:
    """At most ``longest`` greedy tokens of the target after each prompt, and what they took.

    With a draft that proposes ``drafted`` tokens before each forward of the target. ``target`` and ``draft`` in the
    result are counts of forwards.
    """
    forwards = {"target": 0, "draft": 0}

    def counted(name: str) -> Any:
        return lambda *_: forwards.update({name: forwards[name] + 1})

    models = {"target": target, **({"draft": draft} if draft is not None else {})}
    hooks = [model.register_forward_hook(counted(name)) for name, model in models.items()]
    ids = {name: getattr(target.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    before, target.generation_config = target.generation_config, GenerationConfig(**ids)
    if draft is not None:
        # always as many tokens, however sure the draft is
        draft.generation_config = GenerationConfig(
            num_assistant_tokens=drafted, num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0, **ids,
        )  # fmt: skip
    made, began = [], time.perf_counter()
    for prompt in tqdm(prompts, desc="generate" if draft is None else "assisted", unit="prompt"):
        given = torch.tensor([prompt], device=target.device)
        out = target.generate(
            given, attention_mask=torch.ones_like(given), assistant_model=draft, do_sample=False,
            max_new_tokens=longest,
        )  # fmt: skip
        made.append(out[0, len(prompt) :].tolist())
    seconds, tokens = time.perf_counter() - began, sum(map(len, made))
    target.generation_config = before
    for hook in hooks:
        hook.remove()
    return {"made": made, "tokens": tokens, "seconds": seconds, **forwards}
