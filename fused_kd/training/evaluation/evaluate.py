"""Translations, their BLEU and chrF, and how close they are to a teacher's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fused_kd.training.data.pairs import Pair, parse_direction
from fused_kd.training.data.prompts import PromptTemplate, get_prompt
from fused_kd.training.generation import generate

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
