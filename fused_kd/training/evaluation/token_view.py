"""What a student finds difficult: the loss's difficulty of every response token, beside both models' own guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines.gemm import Projection
from fused_kd.integrations.transformers import check_lm_head, hidden_states, lm_head_of
from fused_kd.objectives import Objective
from fused_kd.training.data.prompts import LABEL_PAD, Collator, PairDataset, padding_id
from fused_kd.training.trainer import DEFAULT_GAMMA

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of one side's logits, when the most probable tokens are looked up
_LOOKUP_BYTES = 32 << 20
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class TokenView:
    """One response token.

    ``text`` is what it spells; where a character is spread over ``parts`` tokens (byte-level BPE), what they spell
    together, and ``part`` counts them from 1. ``piece`` is the token alone, bytes as ``<0xF0>``. ``difficulty`` is
    KL(yt||q) in nats, ``q_y`` and ``p_y`` are the student's and the teacher's probability of the token, and the tops
    hold ``(piece, probability)``, most probable first.
    """

    text: str
    piece: str
    part: int
    parts: int
    difficulty: float
    is_hard: bool
    q_y: float
    p_y: float
    student_top: tuple[tuple[str, float], ...]
    teacher_top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class SentenceView:
    """The response of row number ``index`` as one ``checkpoint`` sees it; ``title`` says what was asked."""

    checkpoint: str
    index: int
    title: str
    objective: Objective
    tokens: tuple[TokenView, ...]

    @property
    def mean_difficulty(self) -> float:
        """Nats a token."""
        return sum(token.difficulty for token in self.tokens) / max(len(self.tokens), 1)

    @property
    def hard_fraction(self) -> float:
        """Share of hard tokens, in [0, 1]."""
        return sum(token.is_hard for token in self.tokens) / max(len(self.tokens), 1)


@torch.no_grad()
def token_difficulties(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Sequence[dict[str, list[int]]] | PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    checkpoint: str = "student",
    titles: Sequence[str] | None = None,
    top: int = 3,
    batch_size: int = 8,
) -> list[SentenceView]:
    """The loss's own view of every token with a label, one `SentenceView` a row.

    Difficulty and hardness are those of ``fused_kd.kd_loss`` over all tokens of all rows in one call, which is what
    an objective that ranks tokens ranks. An objective without a gate marks tokens above Γ = 0.4, as the trainer's
    ``hard_fraction`` does. Memory: hidden states of the labelled tokens, and logits of a few tokens at a time.

    Args:
        student, teacher: causal LMs on one device, with one vocabulary (unequal heads are cut to the tokenizer).
            Both run in eval mode and are left in the mode they were in.
        rows: ``input_ids`` and ``labels`` (unshifted, -100 without loss), as `tokenize_pairs` makes them. A label on
            the first token has no prediction and is left out.
        tokenizer: of both models.
        objective: one of ``fused_kd``'s; its λ makes the target, its Γ or fraction the hard tokens.
        checkpoint: the student's name in the views.
        titles: one a row; None (default) decodes the prompts.
        top: how many of the most probable tokens are kept, at least 1; default 3.
        batch_size: rows that the models see at once.

    Raises:
        ValueError: no rows, another number of titles, no labelled token, a size below 1, a model whose head is
            unknown. TypeError: no objective.
    """
    made = list(rows)  # type: ignore[arg-type]
    titles = [_prompt(tokenizer, row) for row in made] if titles is None else list(titles)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a fused_kd objective, got {objective!r}")
    if not made:
        raise ValueError("rows is empty: expected at least one")
    if len(titles) != len(made):
        raise ValueError(f"{len(titles)} titles for {len(made)} rows: expected as many of both")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    responses = [[label for label in row["labels"][1:] if label != LABEL_PAD] for row in made]
    labels = torch.tensor([token for response in responses for token in response], dtype=torch.int64)
    if not len(labels):
        raise ValueError("rows have no token with a label: expected labels other than -100 after the first token")

    heads = [_head(model, made, Collator(padding_id(tokenizer)), batch_size) for model in (student, teacher)]
    sizes = {head.vocab for head in heads}
    vocab = len(tokenizer) if len(sizes) > 1 else sizes.pop()
    out = fk.kd_loss(heads[0], heads[1], labels, objective, reduction="none", vocab_size=vocab, validate=True)
    hard = out.is_hard if objective.spec.gated else out.difficulty > gamma_of(objective)
    (q_y, tops_s), (p_y, tops_t) = (_lookup(head, labels, vocab, top, tokenizer) for head in heads)

    columns = zip(out.difficulty.tolist(), hard.tolist(), q_y, p_y, tops_s, tops_t, strict=True)
    views = []
    for index, (title, response) in enumerate(zip(titles, responses, strict=True)):
        spans = _spans(tokenizer, response)
        tokens = [
            TokenView(text, _piece(tokenizer, token), part, parts, *next(columns))
            for token, (text, part, parts) in zip(response, spans, strict=True)
        ]
        views.append(SentenceView(checkpoint, index, title, objective, tuple(tokens)))
    return views


def gamma_of(objective: Objective) -> float:
    """Γ of the objective, or the one that the trainer counts hard tokens with."""
    return getattr(objective, "gamma", DEFAULT_GAMMA)


def checkpoint_labels(paths: Sequence[str]) -> list[str]:
    """Short names of checkpoint folders: what is left without the leading and trailing parts that all share.

    Raises:
        ValueError: a folder that is given twice.
    """
    if len(set(paths)) < len(paths):
        raise ValueError(f"student checkpoints must differ, got {', '.join(paths)}")
    parts = [list(Path(path).parts) for path in paths]
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    return ["/".join(part) for part in parts]


def _prompt(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == LABEL_PAD]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _head(model: PreTrainedModel, rows: list[dict[str, Any]], collator: Collator, batch_size: int) -> fk.LMHead:
    """The model's head on the states that predict the labelled tokens, (N, H)."""
    check_lm_head(model)
    training = model.training
    model.eval()
    try:
        kept = []
        for start in range(0, len(rows), batch_size):
            batch = collator(rows[start : start + batch_size])
            labels = batch.pop("labels")
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            states = hidden_states(model, **inputs)[:, :-1]
            kept.append(states[(labels[:, 1:] != LABEL_PAD).to(states.device)])
    finally:
        model.train(training)
    return lm_head_of(model, torch.cat(kept))


def _lookup(
    head: fk.LMHead, labels: Tensor, vocab: int, top: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[float], list[tuple[tuple[str, float], ...]]]:
    """Probability of each label, and the ``top`` most probable pieces, from a few tokens' logits at a time."""
    projection = Projection(head.weight[:vocab], None if head.bias is None else head.bias[:vocab], head.hidden.dtype)
    probabilities: list[float] = []
    tops: list[tuple[tuple[str, float], ...]] = []
    count = max(1, _LOOKUP_BYTES // (4 * vocab))
    for start in range(0, len(labels), count):
        hidden = projection.operand(head.hidden[start : start + count])
        logits = torch.empty(len(hidden), vocab, dtype=torch.float32, device=hidden.device)
        projection.logits(hidden, logits)
        logits *= head.logit_scale
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        probs = logits.softmax(-1)
        chosen = labels[start : start + count, None].to(probs.device)
        probabilities += probs.gather(-1, chosen).squeeze(-1).tolist()
        best = probs.topk(min(top, vocab), dim=-1)
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            tops.append(tuple((_piece(tokenizer, token), value) for token, value in zip(ids, values, strict=True)))
    return probabilities, tops


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _spans(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int, int]]:
    """``(text, part, parts)`` of each token; tokens are joined until what they spell are whole characters."""
    spans: list[tuple[str, int, int]] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[:end])
        if text.endswith(_INCOMPLETE) and end < len(ids):
            continue
        parts = end - len(spans)
        spans += [(text[len(done) :], part, parts) for part in range(1, parts + 1)]
        done = text
    return spans


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token alone; one that is no text alone as its bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if token >= len(tokenizer):
        return f"<{token}>"
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = _decode(tokenizer, [token])
    if _INCOMPLETE in text:
        table = {character: byte for byte, character in bytes_to_unicode().items()}
        return "".join(f"<0x{table[c]:02X}>" for c in piece) if all(c in table for c in piece) else piece
    # decoders of Metaspace vocabularies drop the space in front of a first word
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
