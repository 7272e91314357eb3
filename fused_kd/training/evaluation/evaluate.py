"""Batched generation, BLEU and chrF of what it gives, and how close that is to a teacher's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fused_kd.training.data.pairs import Pair, parse_direction
from fused_kd.training.data.prompts import PromptTemplate, encode_prompts, get_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """Corpus scores by sacrebleu, 0-100, higher is better, with the signatures that make them comparable."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


@dataclass(frozen=True)
class Similarity(Scores):
    """`Scores` of a student's output against the teacher's, and the share of equal sentences, 0-1."""

    equal: float


def score(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> Scores:
    """BLEU and chrF (chrF2) of a corpus against one reference each.

    Args:
        hypotheses: translations, in the order of `references`; an empty string is a translation that scores
            nothing.
        references: the expected translations.
        tokenize: sacrebleu's tokenizer for BLEU; default ``"13a"`` (``"zh"``, ``"ja-mecab"``, ... where the
            target language has no spaces).

    Raises:
        ValueError: empty lists, lists of different length. TypeError: something other than lists of strings.
    """
    check_texts({"hypotheses": hypotheses, "references": references})

    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)]).score
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)]).score
    return Scores(bleu_score, chrf_score, str(bleu.get_signature()), str(chrf.get_signature()))


def similarity(hypotheses: Sequence[str], teacher_hypotheses: Sequence[str], *, tokenize: str = "13a") -> Similarity:
    """How close a student's translations are to those that the teacher itself makes of the same sources.

    BLEU and chrF with the teacher's hypotheses as references: high where distillation has taught the student
    to say what the teacher says, right or wrong.

    Args:
        hypotheses: the student's, in the order of `teacher_hypotheses`.
        teacher_hypotheses: the teacher's, decoded alike.
        tokenize: as in `score`.

    Raises:
        ValueError, TypeError: as `score`.
    """
    check_texts({"hypotheses": hypotheses, "teacher_hypotheses": teacher_hypotheses})
    scores = score(hypotheses, teacher_hypotheses, tokenize=tokenize)
    equal = sum(made == wanted for made, wanted in zip(hypotheses, teacher_hypotheses, strict=True))
    return Similarity(**asdict(scores), equal=equal / len(hypotheses))


def check_texts(named: Mapping[str, Sequence[str]]) -> None:
    """Raise unless these are lists of strings, not empty and of one length."""
    for name, texts in named.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a list of strings, one a sentence")
    counts = {name: len(texts) for name, texts in named.items()}
    if len(set(counts.values())) > 1:
        listed = " for ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{listed}: expected as many of {'both' if len(counts) == 2 else 'each'}")
    if not all(counts.values()):
        raise ValueError(f"{' and '.join(counts)} are empty: expected at least one of each")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    progress: bool = True,
) -> list[str]:
    """Continuations of the prompts, in their order.

    Batches are made of prompts of similar length, longest first, and padded on the left. Decoding is greedy,
    or beam search with `num_beams` > 1; sampling settings and penalties in the checkpoint's own generation
    config are left out, so that every model is decoded alike. The model is in eval mode meanwhile and as it
    was afterwards.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer; where it has no pad token, EOS pads.
        prompts: rendered prompts, tokenised as in training (`encode_prompts`), or their token ids.
        batch_size: prompts a batch.
        max_new_tokens: most tokens of one continuation, EOS included.
        num_beams: 1 (default) is greedy.
        length_penalty: a beam's score is its log-probability / (new tokens ** length_penalty); default 1, the
            mean a token. Above it longer translations win, below it shorter ones.
        progress: show a progress bar.

    Returns:
        One string a prompt, without special tokens, line breaks and outer spaces.

    Raises:
        ValueError: no prompts, an empty prompt, a size below 1, no EOS token, a length penalty that is not
            finite or has no beams to rank.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("max_new_tokens", max_new_tokens),
        ("num_beams", num_beams),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)):
        raise TypeError(f"length_penalty must be a number, got {length_penalty!r}")
    if not math.isfinite(length_penalty) or (length_penalty != 1 and num_beams == 1):
        raise ValueError(
            f"length_penalty={length_penalty}, num_beams={num_beams}: expected a finite number, "
            "and 1 where there is no beam search"
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no EOS token: set tokenizer.eos_token")
    rows = _prompt_ids(tokenizer, prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos

    from tqdm import tqdm
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    texts = [""] * len(rows)
    decoder: Any = model
    with _decoding(model), tqdm(total=len(rows), desc="translate", unit="sent", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            length = len(rows[batch[0]])
            padded = [[pad] * (length - len(rows[index])) + rows[index] for index in batch]
            mask = [[0] * (length - len(rows[index])) + [1] * len(rows[index]) for index in batch]
            output = decoder.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            for index, ids in zip(batch, output[:, length:].tolist(), strict=True):
                texts[index] = " ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split())
            bar.update(len(batch))
    return texts


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    direction: str,
    template: PromptTemplate | str,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    progress: bool = True,
) -> tuple[list[str], Scores]:
    """Hypotheses for the sources of `pairs`, and their scores against the targets.

    Arguments and errors are those of `generate` and `score`; `direction` and `template` as in training.
    """
    parse_direction(direction)
    template = get_prompt(template)
    hypotheses = generate(
        model,
        tokenizer,
        [template.render(pair.source, direction) for pair in pairs],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        progress=progress,
    )
    return hypotheses, score(hypotheses, [pair.target for pair in pairs])


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of strings or of token id lists, got one string")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one")
    if all(isinstance(prompt, str) for prompt in prompts):
        rows = encode_prompts(tokenizer, prompts)
    elif any(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts mixes strings and token id lists: expected one kind")
    else:
        rows = [[int(token) for token in prompt] for prompt in prompts]
    empty = next((index for index, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise ValueError(f"prompts[{empty}] has no tokens: expected at least one")
    return rows


@contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[None]:
    from transformers import GenerationConfig

    # generate() fills unset options from the model's own config (repetition_penalty, ...)
    own_config = model.generation_config
    training = [(module, module.training) for module in model.modules()]
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own_config
        for module, mode in training:
            module.training = mode
