"""Batched greedy and beam generation: texts, or the tokens themselves with a model's largest probabilities, on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_kd.training.codes import decode, encode, id_dtype
from fused_kd.training.collate import padding_id
from fused_kd.training.prompts import encode_prompts
from fused_kd.training.stage import bind, check_counts, fingerprint, lock, read_lines, write_bytes, write_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompts = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Decoding:
    """How continuations are searched for.

    Sampling settings and penalties in a checkpoint's own generation config are left out, so that every model is decoded
    alike.

    Args:
        batch_size: prompts a batch.
        max_new_tokens: most tokens of one continuation, EOS included.
        num_beams: 1 (default) is greedy.
        length_penalty: a beam's score is its log-probability / (new tokens ** length_penalty); default 1, the
            mean a token. Above it longer translations win, below it shorter ones.
        temperature: sample each token from ``softmax(logits / temperature)``; None (default) searches instead.
        seed: of the sampling. A batch's samples are its own, whatever was made before it.

    Raises:
        ValueError: a size that is no int of at least 1, a length penalty that is no finite number or has no beams to
            rank, a temperature that is not positive and finite or has beams beside it.
    """

    batch_size: int = 32
    max_new_tokens: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        penalty = self.length_penalty
        number = isinstance(penalty, (int, float)) and math.isfinite(penalty)
        if not number or (penalty != 1 and self.num_beams == 1):
            raise ValueError(
                f"length_penalty={penalty!r}, num_beams={self.num_beams}: expected a finite number, "
                "and 1 where there is no beam search"
            )
        heat = self.temperature
        if heat is not None and (not isinstance(heat, (int, float)) or not 0 < heat < math.inf or self.num_beams > 1):
            raise ValueError(
                f"temperature={heat!r}, num_beams={self.num_beams}: expected a positive finite number and no beams, "
                "or None"
            )


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Args:
        ids: its tokens, EOS included where the model ended it.
        text: without special tokens, otherwise as the tokenizer decodes it.
        finished: whether EOS came before the most tokens were made.
        log_probs, indices: (n, k) float32, largest first, and int64: the k largest of ``log_softmax(logits)`` in fp32
            that the model had where it chose each of the n ``ids``; None where they were not asked for.
    """

    ids: list[int]
    text: str
    finished: bool
    log_probs: np.ndarray | None = None
    indices: np.ndarray | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    progress: bool = True,
    **decoding: Any,
) -> list[str]:
    """Continuations of the prompts, in their order.

    Args:
        model: a causal LM of transformers; in eval mode meanwhile and as it was afterwards.
        tokenizer: its tokenizer; where it has no pad token, EOS pads.
        prompts: rendered prompts, tokenised as in training (`encode_prompts`), or their token ids.
        progress: show a progress bar.
        **decoding: as of `Decoding`.

    Returns:
        One string a prompt, without special tokens, line breaks and outer spaces.

    Raises:
        ValueError: no prompts, an empty prompt, no EOS token; as `Decoding`.
    """
    how, rows = Decoding(**decoding), _prompt_ids(tokenizer, prompts)
    texts = [""] * len(rows)
    for batch, made in _batches(model, tokenizer, rows, how, progress=progress):
        for index, generation in zip(batch, made, strict=True):
            texts[index] = " ".join(generation.text.split())
    return texts


class Generations(Sequence[Generation]):
    """Continuations on disk, all that `generate_to` has made in ``folder``, in the order of the prompts.

    Attributes:
        k: entries of each token's list; None where there are no lists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.k: int | None = None
        made: dict[int, tuple[dict[str, Any], Path, slice]] = {}
        for file in sorted(self.folder.glob("batches/*.jsonl")):
            offset, lists = 0, file.with_suffix(".safetensors")
            for line in read_lines(file):
                row = json.loads(line)
                stop = offset + len(row["ids"])
                made[row.pop("index")] = row, lists, slice(offset, stop)
                offset = stop
            if lists.is_file():
                self.k = _read(lists, slice(0, 0))["indices"].shape[1]
        self._made = [made[index] for index in range(len(made))]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        """One of them, by its number alone."""
        row, lists, tokens = self._made[index]
        if self.k is None:
            return Generation(**row)
        arrays = _read(lists, tokens)
        return Generation(**row, log_probs=decode(arrays), indices=arrays["indices"].astype(np.int64))

    def texts(self) -> list[str]:
        return [row["text"] for row, _, _ in self._made]


def generate_to(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    decoding: Decoding | None = None,
    *,
    k: int | None = None,
    dtype: str = "fp16",
    progress: bool = True,
) -> Generations:
    """`generate` into a folder, a batch at a time: the same call after a kill goes on with the batch it was at.

    A batch is ``batches/N.jsonl`` with ``index``, ``ids``, ``text`` and ``finished`` of each prompt, and
    ``batches/N.safetensors`` with the lists of all their tokens one after another.

    Args:
        folder: bound to the prompts and to how they are decoded, not to the model.
        decoding: default `Decoding()`, greedy.
        k: also keep the k largest log-probabilities of each generated token, at temperature 1; not with beams.
            Default: none.
        dtype: of their storage: "fp16" (default), "8bit" or "fp32", see :mod:`fused_kd.training.codes`.

    Raises:
        ValueError: as `generate`; also ``k`` below 1, above the vocabulary or with beams, and a folder with other
            prompts or settings.
    """
    decoding, rows = decoding or Decoding(), _prompt_ids(tokenizer, prompts)
    if k is not None and (isinstance(k, bool) or not 1 <= k <= len(tokenizer)):
        raise ValueError(f"k={k}: expected at least 1 and at most the {len(tokenizer)} tokens of the tokenizer")
    if k is not None and decoding.num_beams > 1:
        raise ValueError(f"k={k}, num_beams={decoding.num_beams}: lists are not kept of beams")
    folder = bind(folder, {"prompts": fingerprint(rows), "k": k, "dtype": dtype, **vars(decoding)})
    with lock(folder / "batches" / ".lock"):
        numbers = range(len(_order(rows, decoding.batch_size)))
        done = {number for number in numbers if (folder / f"batches/{number:06d}.jsonl").is_file()}
        made = _batches(model, tokenizer, rows, decoding, k=k, skip=done, progress=progress)
        for number, (batch, generations) in zip((n for n in numbers if n not in done), made, strict=True):
            _write_batch(folder / f"batches/{number:06d}.jsonl", batch, generations, len(tokenizer), dtype)
    return Generations(folder)


def _order(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Batches of prompts of similar length, longest first."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    decoding: Decoding,
    *,
    k: int | None = None,
    skip: Collection[int] = (),
    progress: bool = True,
) -> Iterator[tuple[list[int], list[Generation]]]:
    """Batch by batch in `_order`, without those in ``skip``: the rows' indices and what was made of them."""
    eos, pad = tokenizer.eos_token_id, padding_id(tokenizer)
    if eos is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no EOS token: set tokenizer.eos_token")

    from tqdm import tqdm
    from transformers import GenerationConfig, LogitsProcessorList

    heat = decoding.temperature
    config = GenerationConfig(
        **({"do_sample": False} if heat is None else {"do_sample": True, "temperature": heat, "top_k": 0}),
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        max_new_tokens=decoding.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    decoder: Any = model
    with _decoding(model), tqdm(total=len(rows), desc="translate", unit="sent", disable=not progress) as bar:
        for number, batch in enumerate(_order(rows, decoding.batch_size)):
            if number not in skip:
                length = len(rows[batch[0]])
                padded = [[pad] * (length - len(rows[index])) + rows[index] for index in batch]
                mask = [[0] * (length - len(rows[index])) + [1] * len(rows[index]) for index in batch]
                seen = None if k is None else _TopK(k, len(tokenizer))
                with _seeded(decoding, number):
                    output = decoder.generate(
                        input_ids=torch.tensor(padded, device=model.device),
                        attention_mask=torch.tensor(mask, device=model.device),
                        generation_config=config,
                        logits_processor=LogitsProcessorList([] if seen is None else [seen]),
                    )
                yield batch, _generations(tokenizer, output[:, length:].tolist(), eos, seen)
            bar.update(len(batch))


@contextmanager
def _seeded(decoding: Decoding, batch: int) -> Iterator[None]:
    """The random numbers of a batch's sampling; the global generators are as they were afterwards."""
    if decoding.temperature is None:
        yield
        return
    place = torch.accelerator.current_accelerator(check_available=True)
    with torch.random.fork_rng(device_type="cuda" if place is None else place.type):
        torch.manual_seed(decoding.seed + 1_000_003 * batch)
        yield


class _TopK:
    """A logits processor that changes nothing and keeps each step's largest log-probabilities.

    It is given the raw logits: as the only processor of greedy decoding, and before the temperature of sampling.
    """

    def __init__(self, k: int, vocab_size: int) -> None:
        self.k, self.vocab_size = k, vocab_size
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values, ids = scores[:, : self.vocab_size].float().log_softmax(-1).topk(self.k)
        self.steps.append((values.cpu(), ids.cpu()))
        return scores


def _generations(
    tokenizer: PreTrainedTokenizerBase, output: list[list[int]], eos: int, seen: _TopK | None
) -> list[Generation]:
    made = []
    for row, tokens in enumerate(output):
        ids = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        steps = [] if seen is None else seen.steps[: len(ids)]
        lists = (torch.stack([step[part][row] for step in steps]).numpy() for part in (0, 1) if steps)
        made.append(Generation(ids, str(tokenizer.decode(ids, skip_special_tokens=True)), eos in tokens, *lists))
    return made


def _read(file: Path, tokens: slice) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_slice(name)[tokens] for name in opened.keys()}  # noqa: SIM118


def _write_batch(file: Path, batch: list[int], made: list[Generation], vocab_size: int, dtype: str) -> None:
    if made[0].log_probs is not None:
        from safetensors.numpy import save

        log_probs = np.concatenate([generation.log_probs for generation in made])
        indices = np.concatenate([generation.indices for generation in made]).astype(id_dtype(vocab_size))
        write_bytes(file.with_suffix(".safetensors"), save({"indices": indices, **encode(log_probs, dtype)}))
    rows = [
        {"index": index, "ids": generation.ids, "text": generation.text, "finished": generation.finished}
        for index, generation in zip(batch, made, strict=True)
    ]
    write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))  # last: a batch is done where this file is


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    texts = [isinstance(prompt, str) for prompt in prompts]
    if isinstance(prompts, str) or (any(texts) and not all(texts)):
        raise TypeError("prompts must be a list of strings or of token id lists, not one string, nor both mixed")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one")
    rows = encode_prompts(tokenizer, prompts) if all(texts) else [[int(token) for token in row] for row in prompts]
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
