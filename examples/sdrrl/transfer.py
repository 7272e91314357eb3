"""From answers to training rows: translators, scores of translations, the filter, code-switching, the combinations.

Rows are JSON objects. A *candidate* is a task in both languages, ``{"id", "source", "target", "scores"}``: question and
answer in the rich language, their translations ("" where there is none), and a score for each text that there is, none
at all where a translation is missing. A *training row* is ``{"id", "part", "instruction", "input", "output"}``; its
part is a combination ("ss", "st", "ts", "tt") or a direction ("en-de").
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sacrebleu.metrics import CHRF
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from fused_kd.training.data import language_name
from fused_kd.training.generate import Decoding
from fused_kd.training.models import language_id, load_pretrained, on_accelerator
from fused_kd.training.stage import read_json, read_lines, write_lines

COMBINATIONS = ("ss", "st", "ts", "tt")
PARALLEL = "parallel"
# letters, with hyphens and apostrophes between them: "T-Shirt" and "man's" are words, "3D" and "my_cat" none
WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:[-'’][^\W\d_]+)*(?!\w)")
_BREAK = re.compile(r"""\s*\n\s*|(?<=[.!?])[ \t]+(?=["'(]?([^\W\d_]))""")

Row = dict[str, Any]
Senses = Mapping[str, Sequence[str]]


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in read_lines(file)]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))


@dataclass(frozen=True)
class Arm:
    """What a model is trained on; the defaults are the whole recipe, and each field takes a part away.

    Raises:
        ValueError: unknown answers; no combination, an unknown one, or one twice.
    """

    # the model's "own", those "given" with the instructions, or with "reference" the instructions' own text in the
    # target language as well (nothing is translated then, and nothing filtered)
    answers: Literal["own", "given", "reference"] = "own"
    # of question and answer language: "ts" is asked in the target language, answered in the source language
    combinations: Sequence[str] = COMBINATIONS
    quality_filter: bool = True  # keep good translations alone
    code_switch: bool = True  # switch words of the questions
    parallel: bool = True  # add translation instructions
    pairs: int | None = None  # at most so many translated pairs to train on; None: all
    # of the training rows, the weight of each combination and of "parallel"; None: as many as there are of each
    shares: Mapping[str, float] | None = None
    training: Mapping[str, Any] | None = None  # options of TrainingArguments in which this arm differs

    def __post_init__(self) -> None:
        if self.answers not in ("own", "given", "reference"):
            raise ValueError(f"answers={self.answers!r}: expected own, given or reference")
        asked = list(self.combinations)
        if not asked or len(set(asked)) != len(asked) or not set(asked) <= set(COMBINATIONS):
            raise ValueError(f"combinations={asked!r}: expected some of {', '.join(COMBINATIONS)}, each once")
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs!r}")
        parts = {*asked, *([PARALLEL] if self.parallel else [])}
        if self.shares is not None and (set(self.shares) != parts or not all(w > 0 for w in self.shares.values())):
            raise ValueError(
                f"shares={self.shares!r}: expected a weight above 0 for each of {', '.join(sorted(parts))}"
            )


# translation


def translate_texts(texts: Sequence[str], translate: Callable[[list[str]], list[str]]) -> dict[str, str]:
    """Each different text and its translation, "" where a part of it got none.

    Translators take sentences: texts are divided at line breaks and sentence ends, each different piece is translated
    once, and what lay between them is put back.
    """
    divided = {text: divide(text) for text in dict.fromkeys(texts)}
    pieces = list(dict.fromkeys(piece for parts in divided.values() for piece in parts[::2] if piece))
    made = translate(pieces) if pieces else []
    found = {"": ""} | dict(zip(pieces, (" ".join(text.split()) for text in made), strict=True))
    whole = {}
    for text, parts in divided.items():
        there = all(found[piece] for piece in parts[::2] if piece)
        joined = [part if number % 2 else found[part] for number, part in enumerate(parts)]
        whole[text] = "".join(joined) if there else ""
    return whole


def divide(text: str) -> list[str]:
    """Sentences at even places, what lies between them at odd ones; a sentence begins with a capital."""
    parts, start = [], 0
    for found in _BREAK.finditer(text):
        if found[1] is None or found[1].isupper():
            parts += [text[start : found.start()], found[0]]
            start = found.end()
    return [*parts, text[start:]]


def translate_words(texts: Sequence[str], senses: Senses) -> list[str]:
    """Word by word, the first sense of each, in the word's case; words that are not there stay."""
    return [WORD.sub(lambda word: in_case_of(word[0], senses.get(word[0].lower(), word)[0]), text) for text in texts]


def translate_seq2seq(
    folder: Path, name: str, codes: Mapping[str, str], direction: tuple[str, str], texts: Sequence[str], how: Decoding
) -> list[str]:
    """Translations by a multilingual encoder-decoder of transformers, such as NLLB-200 or M2M-100.

    Args:
        folder: keeps each batch that is done, for a call after a kill; of these texts, model and settings alone.
        name: a hub name or folder.
        codes: the model's own code of each language, such as ``{"en": "eng_Latn", "de": "deu_Latn"}``.
        texts: those longer than the tokenizer's limit are cut.

    Returns:
        One a text, "" where it did not end within ``how.max_new_tokens``.

    Raises:
        ValueError: no such model, an unknown code.
    """
    if unknown := [language for language in direction if language not in codes]:
        known = ", ".join(codes) or "none"
        raise ValueError(f"translator_codes has no code for the language {unknown[0]!r} (there: {known})")
    source, target = (codes[language] for language in direction)
    try:
        tokenizer = load_pretrained(AutoTokenizer, name, src_lang=source)
        model = load_pretrained(AutoModelForSeq2SeqLM, name, dtype="auto").eval()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"translator={name!r} is neither a folder nor a hub name that gives a translation model "
            f"(online or in the hub's cache): {error}"
        ) from error
    language_id(tokenizer, source)
    model = on_accelerator(model)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 20))
    config = GenerationConfig(
        do_sample=False,
        num_beams=how.num_beams,
        length_penalty=how.length_penalty,
        max_new_tokens=how.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        forced_bos_token_id=language_id(tokenizer, target),
    )
    # longest first: batches of similar length, and too large a batch fails at once
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found: dict[int, str] = {}
    for start in tqdm(range(0, len(order), how.batch_size), desc="-".join(direction), unit="batch"):
        batch, file = order[start : start + how.batch_size], folder / "batches" / f"{start:08d}.jsonl"
        if not file.is_file():
            given = [texts[index] for index in batch]
            inputs = tokenizer(given, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            with torch.no_grad():
                output = model.generate(**inputs.to(model.device), generation_config=config).tolist()
            # without an end there is none; the decoder's start is EOS in these models
            ended = [tokenizer.eos_token_id in ids[1:] for ids in output]
            made = [tokenizer.decode(ids, skip_special_tokens=True) for ids in output]
            write_rows(file, [{"text": text if end else ""} for text, end in zip(made, ended, strict=True)])
        found |= {index: row["text"] for index, row in zip(batch, read_rows(file), strict=True)}
    return [found[index] for index in range(len(texts))]


# how good translations are, without a reference


def round_trip(sources: Sequence[str], back: Sequence[str]) -> list[float]:
    """chrF of the translation's translation back against the source, 0-1: the score that needs no other model.

    It sees what the translator itself loses. It does not see an error that the way back undoes (a word left as it was,
    a wrong sense with the same way back), and its values are no CometKiwi's: the threshold is another.
    """
    chrf = CHRF()
    pairs = zip(sources, back, strict=True)
    return [chrf.sentence_score(text, [source]).score / 100 if text.strip() else 0.0 for source, text in pairs]


def comet_kiwi(
    folder: Path, sources: Sequence[str], translations: Sequence[str], command: str, model: str, batch_size: int
) -> list[float]:
    """CometKiwi, a learned score of source and translation, by the package's own ``comet-score`` (``command``).

    Raises:
        ValueError: the command cannot be started, or fails; its messages are above.
    """
    files = [(folder / f"{name}.txt").resolve() for name in ("sources", "translations")]
    for file, texts in zip(files, (sources, translations), strict=True):
        write_lines(file, (" ".join(text.split()) for text in texts))
    answer = (folder / "comet.json").resolve()
    call = [command, "-s", files[0], "-t", files[1], "--model", model, "--batch_size", str(batch_size)]
    call += ["--gpus", str(int(torch.cuda.is_available())), "--quiet", "--to_json", answer]
    try:
        subprocess.run(call, stdout=2, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"comet={command!r} gave no scores of the model {model!r}: {error}") from error
    return [float(segment["COMET"]) for segment in next(iter(read_json(answer).values()))]


def pair_up(row: Row, questions: Mapping[str, Row], answers: Mapping[str, Row]) -> Row:
    """A candidate of an answered question in the rich language; the mappings have each text's translation and score."""
    source = {name: row[name] for name in ("instruction", "input", "output")}
    made = {name: (answers if name == "output" else questions)[text] for name, text in source.items() if text}
    target = {name: made[name]["translation"] if name in made else "" for name in source}
    whole = all(found["translation"] for found in made.values())
    scores = {name: found["score"] for name, found in made.items()} if whole else {}
    return {"id": row["id"], "source": source, "target": target, "scores": scores}


def kept(candidates: Sequence[Row], tau: float | None) -> tuple[list[Row], dict[str, int]]:
    """Candidates whose worst text scores at least ``tau`` (None: any), and counts.

    A pair without a translation of a text is ``untranslated`` and never kept.
    """
    whole = [candidate for candidate in candidates if candidate["scores"]]
    good = [candidate for candidate in whole if tau is None or min(candidate["scores"].values()) >= tau]
    counts = {"candidates": len(candidates), "untranslated": len(candidates) - len(whole)}
    return good, counts | {"below_tau": len(whole) - len(good), "kept": len(good)}


# code-switching


def load_dictionary(path: str) -> tuple[Senses, Senses]:
    """A dictionary and its reverse from a TSV file, plain or ``.gz``: each word's senses, in lower case and in order.

    Pairs of equal words are left out: such a switch would change nothing. Blank lines are passed over.

    Raises:
        ValueError: no such file, a line that is not two texts with a tab between (with its place), no pairs at all.
    """
    forward: dict[str, list[str]] = {}
    backward: dict[str, list[str]] = {}
    opener: Any = gzip.open if path.endswith(".gz") else open
    try:
        with opener(Path(path).expanduser(), "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                pair = [" ".join(text.split()).lower() for text in line.split("\t")]
                if line.strip() and (len(pair) != 2 or not all(pair)):
                    raise ValueError(f"{path}, line {number}: expected a word, a tab and its translation, got {line!r}")
                if line.strip() and pair[0] != pair[1] and pair[1] not in forward.get(pair[0], ()):
                    forward.setdefault(pair[0], []).append(pair[1])
                    backward.setdefault(pair[1], []).append(pair[0])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"dictionary={path!r} cannot be read: {error}") from error
    if not forward:
        raise ValueError(f"dictionary={path!r}: no pairs of different words")
    return forward, backward


def code_switch(text: str, senses: Senses, *, p: float, seed: int, key: str) -> str:
    """``text`` with each word that the dictionary has replaced with probability ``p``.

    A whole word goes for one of its senses, all equally likely; what lies between words stays. The sense is written as
    the word was: in lower case, with a capital (a single capital letter too), or in capitals; a word of mixed case
    gets the sense as the dictionary has it.

    Args:
        p: in [0, 1]. Words that the dictionary lacks stay, so the share of all words that change is below it.
        seed, key: what the choice depends on besides the text; with a key of its own a row is switched alike whatever
            other rows there are.
    """
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))

    def switched(match: re.Match[str]) -> str:
        # two draws a word, known or not: another entry in the dictionary changes no other word
        drawn, which = rng.random(), rng.random()
        known = senses.get(match[0].lower())
        if not known or drawn >= p:
            return match[0]
        return in_case_of(match[0], known[int(which * len(known))])

    return WORD.sub(switched, text)


def in_case_of(word: str, sense: str) -> str:
    """``sense`` in the case of ``word``: lower, Title or UPPER."""
    if word.islower():
        return sense.lower()
    if word.isupper() and len(word) > 1:
        return sense.upper()
    if word[0].isupper() and not any(char.isupper() for char in word[1:].replace("-", "")):
        return sense[0].upper() + sense[1:].lower()
    return sense


# rows


def answer_in(asked: str, answered: str, wording: Mapping[str, str]) -> str:
    """The instruction after a question; "" where question and answer are in one language, else English by default."""
    return "" if asked == answered else wording.get(f"{asked}-{answered}", f"Answer in {language_name(answered)}.")


def translate_as(source: str, target: str, wording: Mapping[str, str]) -> str:
    """The instruction above a sentence to translate; English by default."""
    plain = f"Translate the following text from {language_name(source)} to {language_name(target)}."
    return wording.get(f"{source}-{target}", plain)


def combine(
    candidates: Sequence[Row],
    combinations: Sequence[str],
    languages: tuple[str, str],
    wording: Mapping[str, str],
    switch: Callable[[str, str, str], str] = lambda text, language, key: text,
) -> list[Row]:
    """Every candidate in each combination of question and answer language, with switched questions.

    The language instruction comes after the question, is in the question's language, and is not switched; nor are
    answers. ``languages`` are source and target; ``switch(text, language, key)`` switches one text of a question.
    """
    rows = []
    for candidate in candidates:
        sides = {"s": (languages[0], candidate["source"]), "t": (languages[1], candidate["target"])}
        for part in combinations:
            (asked, question), (answered, answer) = sides[part[0]], sides[part[1]]
            texts = {
                name: switch(question[name], asked, f"{candidate['id']} {part} {name}")
                for name in ("instruction", "input")
            }
            instruction = " ".join(filter(None, (texts["instruction"], answer_in(asked, answered, wording))))
            texts |= {"instruction": instruction, "output": answer["output"]}
            rows.append({"id": candidate["id"], "part": part, **texts})
    return rows


def translation_rows(
    pairs: Sequence[Mapping[str, str]], languages: tuple[str, str], wording: Mapping[str, str]
) -> list[Row]:
    """Each parallel sentence as a translation instruction, in both directions."""
    rows = []
    for number, pair in enumerate(pairs):
        for source, target in (languages, languages[::-1]):
            texts = {"input": pair[source], "output": pair[target]}
            row = {"id": f"parallel-{number}", "part": f"{source}-{target}"}
            rows.append({**row, "instruction": translate_as(source, target, wording), **texts})
    return rows


def fill(rows: Sequence[Row], count: int, seed: int, shares: Mapping[str, float] | None = None) -> list[Row]:
    """Exactly ``count`` (at least 1) rows in random order: all of them as often as they fit in, then a part of them.

    No row comes more than once more often than another. So arms with fewer rows of their own train as many steps. With
    ``shares`` that holds within each part, and the parts come in the ratio of their shares.
    """
    rng, groups = random.Random(seed), [(count, list(rows))]
    if shares is not None:
        total, done, groups = sum(shares.values()), 0.0, []
        for part, share in shares.items():
            of_part = [row for row in rows if (row["part"] if row["part"] in COMBINATIONS else PARALLEL) == part]
            before, done = done, done + share / total
            groups.append((round(count * done) - round(count * before), of_part))
    filled: list[Row] = []
    for number, found in groups:
        filled += found * (number // len(found)) + rng.sample(found, number % len(found))
    rng.shuffle(filled)
    return filled
