"""Several translations of a sentence, and the one to keep: by what the model itself can say of them, no reference.

Scorers, each higher for a better translation: ``log_prob``, the model's mean log-probability a token;
``round_trip``, the mean log-probability a token of the source, translated back from it; ``mbr``, the mean chrF to all
the candidates (minimum Bayes risk). Of several the sum counts, each standardised within the sentence's candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fused_kd.training.collate import padding_id

SCORERS = ("log_prob", "round_trip", "mbr")
ORDER, BETA = 6, 2  # chrF2


def mbr_scores(texts: Sequence[str]) -> list[float]:
    """Each text's mean chrF2, 0-100, to the texts, itself among them; equal texts count as often as they come."""
    times = Counter(texts)
    unique = list(times)
    weights = np.array([times[text] for text in unique]) / len(texts)
    found = dict(zip(unique, (chrf_matrix(unique) @ weights).tolist(), strict=True))
    return [found[text] for text in texts]


def chrf_matrix(texts: Sequence[str]) -> np.ndarray:
    """(n, n) chrF2 of each text, a row, against each as its reference, a column; as sacrebleu's of a sentence."""
    letters = ["".join(text.split()) for text in texts]
    lengths = np.array([len(text) for text in letters])
    owner = np.repeat(np.arange(len(texts)), lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # letters up to the end of its text
    alphabet, letter = np.unique([ord(char) for text in letters for char in text], return_inverse=True)
    precision, recall, orders = (np.zeros((len(texts), len(texts))) for _ in range(3))
    gram = letter
    for n in range(1, ORDER + 1):
        if n > 1:  # an n-gram is known by the gram before its last letter and that letter
            gram = np.unique(gram[:-1] * len(alphabet) + letter[n - 1 :], return_inverse=True)[1]
        whole = left[: len(gram)] >= n
        size = gram.max(initial=0) + 1
        counts = np.bincount(owner[: len(gram)][whole] * size + gram[whole], minlength=len(texts) * size)
        counts = counts.reshape(len(texts), size)
        shared = np.minimum(counts[:, None], counts[None]).sum(-1)
        made = counts.sum(-1)
        both = (made[:, None] > 0) & (made[None] > 0)
        precision += np.where(both, shared / np.maximum(made, 1)[:, None], 0)
        recall += np.where(both, shared / np.maximum(made, 1)[None], 0)
        orders += both
        if len(gram) < 2:
            break
    below = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / np.where(below > 0, below * np.maximum(orders, 1), 1)


@torch.no_grad()
def mean_log_probs(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], batch_size: int
) -> list[float]:
    """The model's mean log-probability a token of each response after its prompt; what comes again is done once."""
    pairs = [(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    found, pad, training = {}, padding_id(tokenizer), model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [[*prompt, *response] for prompt, response in batch]
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=model.device)
        begins = torch.tensor([len(prompt) for prompt, _ in batch], device=model.device)
        own = mask * (torch.arange(length, device=model.device) >= begins[:, None])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        log_probs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        means = (log_probs * own[:, 1:]).sum(1) / own[:, 1:].sum(1)
        found.update(zip(batch, means.tolist(), strict=True))
    model.train(training)
    return [found[pair] for pair in pairs]


def summed(parts: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
    """Several scorers' sum for each sentence's candidates, standardised; of one scorer its scores as they are."""
    if len(parts) > 1:
        parts = [[standardised(scores) for scores in part] for part in parts]
    return [np.sum(each, axis=0).tolist() for each in zip(*parts, strict=True)]


def standardised(scores: Sequence[float]) -> np.ndarray:
    """With mean 0 and deviation 1; zeros where all are equal."""
    values = np.asarray(scores, dtype=np.float64)
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 1e-9 else np.zeros_like(values)
