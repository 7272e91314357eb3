"""How kernels are told of a row's terms: tuples of numbers and functions that are compiled in, and their places."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from typing import Any

import triton
import triton.language as tl

from ...divergences import DIVERGENCES
from ...terms import GATES, RowSpec, Term
from ..contract import OUTERS, traits

# A term: its formulas, what they are made of, where its scalars lie, and its traits.
TERM = ("h", "g", "digest", "index", "has_teacher", "free", "mixture", "powers", "kl_at_one", "adaptive", "everywhere",
        "covers", "outer", "mixed", "hard_label", "gate", "z_loss")  # fmt: skip
_PLACES = [tl.constexpr(i) for i, name in enumerate(TERM) if name != "digest"]
H, G, INDEX, HAS_TEACHER, FREE, MIXTURE, POWERS, KL_AT_ONE = _PLACES[:8]
ADAPTIVE, EVERYWHERE, COVERS, OUTER, MIXED, HARD_LABEL, GATE, Z_LOSS = _PLACES[8:]
MINUS_LOG, MIX = (tl.constexpr(OUTERS.index(name)) for name in ("minus_log", "mix"))

# All terms together. Rows that take sums: whether some row does not (``ALWAYS``: none), and of which softmaxes and
# labels their gradient has a multiple beside the sums; rows that take none, or all rows alike: the same.
ROW = ("main", "gate", "always", "cold", "z", "sums_p", "sums_y", "all_p", "all_y")
MAIN, ROW_GATE, ALWAYS, COLD, Z, SUMS_P, SUMS_Y, ALL_P, ALL_Y = (tl.constexpr(i) for i in range(len(ROW)))

NO_GATE = tl.constexpr(0)
BY_DIFFICULTY, BY_EXCESS, BY_KL, BY_RANK, BY_ENTROPY = (tl.constexpr(1 + i) for i in range(len(GATES)))


@functools.cache
def formula_constants(spec: RowSpec, cold_labels: bool) -> dict[str, Any]:
    """What makes one kernel a spec's: its terms, those of them that have sums of their own, and what all have.

    A tuple of compile-time values enters the key of Triton's cache on disk by its text, in which a function is its
    name: the digest of its source has a changed formula compiled anew.
    """
    terms = tuple(_term(term, i) for i, term in enumerate(spec.terms))
    kl = [term for term in spec.terms if term.divergence is not None and _may_be_kl(term)]
    free = [term for term in kl if term.free]
    warm_label = not cold_labels and any(term.hard_label for term in spec.terms)
    mix = any(term.of.outer == "mix" for term in spec.terms)
    row = {
        "main": spec.main,
        "gate": ("", *GATES).index(spec.gate),
        "always": any(not _may_be_kl(spec.terms[i]) for i in spec.tabled),
        "cold": cold_labels,
        "z": any(term.z_loss for term in spec.terms),
        "sums_p": mix or bool(free),
        "sums_y": warm_label or any(term.mixed for term in free),
        "all_p": mix or bool(kl),
        "all_y": warm_label or any(term.mixed for term in kl),
    }
    return {
        "TERMS": terms,
        "TABLED": tuple(terms[i] for i in spec.tabled),
        "ROW": tuple(int(row[name]) for name in ROW),
    }


def _may_be_kl(term: Term) -> bool:
    return term.free or term.of.kl_at_one or term.chooses


def _term(term: Term, index: int) -> tuple[Any, ...]:
    of = term.of
    own = traits(term) | {"h": _FUNCTIONS[of.h], "g": _FUNCTIONS[of.g], "index": index}
    text = inspect.getsource(of.h) + inspect.getsource(of.g)
    own["digest"] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return tuple(own[name] for name in TERM)


# The interpreter calls plain functions and asserts on jitted ones.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_FUNCTIONS = {
    f: f if INTERPRET else triton.jit(f) for divergence in DIVERGENCES.values() for f in (divergence.h, divergence.g)
}
