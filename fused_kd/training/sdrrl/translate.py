"""Translators: a sequence-to-sequence model by name, a causal one with a prompt, or a dictionary; resumable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fused_kd.training.data.prompts import get_prompt
from fused_kd.training.generation import Decoding, generate_to
from fused_kd.training.loading import load_pretrained
from fused_kd.training.presets import language_id
from fused_kd.training.runs import Run, read_lines, write_lines
from fused_kd.training.sdrrl.code_switch import WORD, in_case_of
from fused_kd.training.sdrrl.dictionary import Dictionary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LINE_BREAK = re.compile(r"\s*\n\s*")
_SENTENCE_END = re.compile(r"""(?<=[.!?])[ \t]+(?=["'(]?[^\W\d_])""")


class Translator(Protocol):
    """Translates texts of one language into another."""

    def __call__(self, folder: Path, texts: Sequence[str], source: str, target: str) -> list[str]:
        """One translation a text, "" where none was found; done work is in ``folder``, for a call after a kill."""
        ...


def translate_texts(
    folder: Path, texts: Sequence[str], translator: Translator, source: str, target: str
) -> dict[str, str]:
    """Each different text and its translation, "" where a part of it got none.

    Translators take sentences: texts are divided at line breaks and sentence ends, each different piece is translated
    once, and what lay between them is put back.
    """
    divided = {text: divide(text) for text in dict.fromkeys(texts)}
    pieces = list(dict.fromkeys(piece for parts in divided.values() for piece in parts[::2] if piece))
    made = translator(folder, pieces, source, target) if pieces else []
    found = dict(zip(pieces, (" ".join(text.split()) for text in made), strict=True))
    whole = {}
    for text, parts in divided.items():
        there = all(found[piece] for piece in parts[::2] if piece)
        joined = [found.get(part, "") if number % 2 == 0 else part for number, part in enumerate(parts)]
        whole[text] = "".join(joined) if there else ""
    return whole


def divide(text: str) -> list[str]:
    """Sentences at even places, what lies between them at odd ones; a sentence begins with a capital."""
    parts = []
    start = 0
    breaks = [(match, True) for match in _LINE_BREAK.finditer(text)]
    breaks += [(match, False) for match in _SENTENCE_END.finditer(text)]
    for match, always in sorted(breaks, key=lambda found: found[0].start()):
        following = text[match.end() :].lstrip("\"'(")[:1]
        if match.start() >= start and (always or following.isupper()):
            parts += [text[start : match.start()], match[0]]
            start = match.end()
    return [*parts, text[start:]]


class CausalTranslator:
    """A causal LM, asked with one of the translation prompts, such as a model that ``train_stage`` trained.

    Args:
        load: makes model and tokenizer; called where there is something left to translate.
        prompt: a name in ``fused_kd.training.data.prompts.PROMPTS``; default "tiny".
        decoding: default greedy, 128 new tokens. A translation without an end counts as none.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        prompt: str = "tiny",
        decoding: Decoding | None = None,
    ) -> None:
        self.load, self.template, self.decoding = load, get_prompt(prompt), decoding or Decoding()

    def __call__(self, folder: Path, texts: Sequence[str], source: str, target: str) -> list[str]:
        model, tokenizer = self.load()
        prompts = [self.template.render(text, f"{source}-{target}") for text in texts]
        made = generate_to(folder, model, tokenizer, prompts, self.decoding)
        return [generation.text if generation.finished else "" for generation in made]


class Seq2SeqTranslator:
    """A multilingual encoder-decoder of transformers, such as NLLB-200 or M2M-100.

    Args:
        name: a hub name or folder.
        codes: the model's own code of each language, such as ``{"en": "eng_Latn", "de": "deu_Latn"}``.
        decoding: default greedy, 128 new tokens. Longer inputs than the tokenizer's limit are cut.

    Raises:
        ValueError: on the first call: no such model, an unknown code.
    """

    def __init__(self, name: str, codes: Mapping[str, str], decoding: Decoding | None = None) -> None:
        self.name, self.codes, self.decoding = name, dict(codes), decoding or Decoding()

    def __call__(self, folder: Path, texts: Sequence[str], source: str, target: str) -> list[str]:
        d = self.decoding
        about = {"texts": _fingerprint(texts), "direction": f"{source}-{target}", **vars(d)}
        run = Run(folder, about)
        # longest first: batches of similar length, and too large a batch fails at once
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        batches = [order[start : start + d.batch_size] for start in range(0, len(order), d.batch_size)]
        files = [run.folder / "batches" / f"{number:06d}.jsonl" for number in range(len(batches))]
        with run.lock("batches"):
            left = [number for number, file in enumerate(files) if not file.is_file()]
            if left:
                self._translate(texts, source, target, {number: batches[number] for number in left}, files)
        found = {}
        for file in files:
            for line in read_lines(file):
                row = json.loads(line)
                found[row["index"]] = row["text"] if row["finished"] else ""
        return [found[index] for index in range(len(texts))]

    def _translate(
        self, texts: Sequence[str], source: str, target: str, batches: Mapping[int, list[int]], files: list[Path]
    ) -> None:
        import torch
        from tqdm import tqdm
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

        codes = [self._code(language) for language in (source, target)]
        try:
            tokenizer = load_pretrained(AutoTokenizer, self.name, src_lang=codes[0])
            model: Any = load_pretrained(AutoModelForSeq2SeqLM, self.name, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"translator.model={self.name!r} is neither a folder nor a hub name that gives a translation model "
                f"(online or in the hub's cache): {error}"
            ) from error
        start = language_id(tokenizer, codes[1])
        language_id(tokenizer, codes[0])
        if torch.cuda.is_available():
            model = model.cuda()
        config = GenerationConfig(
            do_sample=False,
            num_beams=self.decoding.num_beams,
            length_penalty=self.decoding.length_penalty,
            max_new_tokens=self.decoding.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=model.config.decoder_start_token_id,
            forced_bos_token_id=start,
        )
        model.eval()
        for number, batch in tqdm(batches.items(), desc=f"{source}-{target}", unit="batch"):
            limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 20))
            inputs = tokenizer(
                [texts[index] for index in batch], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            with torch.no_grad():
                output = model.generate(**inputs.to(model.device), generation_config=config)
            made = zip(batch, output.tolist(), strict=True)
            lines = [
                {
                    "index": index,
                    "text": tokenizer.decode(ids, skip_special_tokens=True),
                    # the decoder's start is EOS in these models
                    "finished": tokenizer.eos_token_id in ids[1:],
                }
                for index, ids in made
            ]
            write_lines(files[number], (json.dumps(line, ensure_ascii=False) for line in lines))

    def _code(self, language: str) -> str:
        if language not in self.codes:
            known = ", ".join(self.codes) or "none"
            raise ValueError(f"translator.codes has no code for the language {language!r} (there: {known})")
        return self.codes[language]


class DictionaryTranslator:
    """Word by word, the first sense of each, in the word's case; words that are not there stay.

    Args:
        dictionaries: one for each direction, ``{"en-de": ...}``.
    """

    def __init__(self, dictionaries: Mapping[str, Dictionary]) -> None:
        self.dictionaries = dictionaries

    def __call__(self, folder: Path, texts: Sequence[str], source: str, target: str) -> list[str]:
        known = self.dictionaries[f"{source}-{target}"]
        return [
            WORD.sub(lambda match: in_case_of(match[0], known.get(match[0])[0]) if known.get(match[0]) else match[0], t)
            for t in texts
        ]


def _fingerprint(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
