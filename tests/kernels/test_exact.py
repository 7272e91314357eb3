"""Every row against 50 digits, on rows made nasty on purpose: no worse than 4 times eager PyTorch in fp32 on the same
row, and right where that is not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

import fused_kd as fk
from fused_kd.divergences import LEAST_SUM
from fused_kd.objectives import Objective

from ..problems import (
    CPU_BACKENDS,
    JUMPS,
    amplified,
    eager_rows,
    gradients,
    has_powers,
    may_overflow,
    reads_level,
    summands,
)
from .exact import Exact, Groups, exact
from .ways import Found, Run, every_way, through_the_loss, variants

INF = math.inf


def _rows() -> Iterator[tuple[str, list[float], list[float], int]]:
    """Name, student's logits, teacher's, label."""
    g = torch.Generator().manual_seed(0)

    def randn(V: int, std: float = 3.0) -> list[float]:
        return (std * torch.randn(V, generator=g)).tolist()

    yield "one word", [3.0], [-1e4], 0
    yield "two words", [1.0, -0.5], [-2.0, 0.25], 1
    yield "two words far apart", [1e4, -1e4], [-1e4, 1e4], 0
    yield "three words", randn(3), randn(3), 2
    for y in (0, 3):
        yield f"plain {y}", randn(7), randn(7), y
    yield "far", [-6.0, 4.0, 9.0, -8.0, 0.0, 2.0, 5.0], [8.0, -3.0, -5.0, 2.0, 9.0, 0.0, -7.0], 1
    yield "equal", (same := randn(7)), list(same), 4
    yield "near", (same := randn(7)), [x + 1e-3 * (i - 3) for i, x in enumerate(same)], 2
    yield "near ties", [5.0, 5.0 + 5e-7, 5.0 - 5e-7, 5.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0 + 5e-7, 0.0, 1e-7, 1.0], 1
    yield "huge", [x * 3000 for x in randn(7)], [x * 3000 for x in randn(7)], 5
    yield "one-hot alike", [1e4, *randn(6)], [1e4, *randn(6)], 0
    yield "one-hot apart", [*randn(6), 300.0], [300.0, *randn(6)], 2
    yield "the label underflows", [0.0, -1e4, 1.0], [1.0, 2.0, 0.0], 1
    yield "subnormal", [0.0, -90.0, -95.0, -100.0, 2.0, 1.0, -88.0], [-91.0, 0.0, -89.0, -102.0, 1.0, 2.0, -87.0], 4
    yield "offset", [x + 4096 for x in (1.0, 2.5, -3.0)], [x - 8192 for x in (1.5, 2.0, -0.5)], 0
    # excluded tokens
    yield "both exclude", [*randn(5), -INF, -INF], [*randn(5), -INF, -INF], 1
    yield "teacher excludes", randn(7), [*randn(4), -INF, *randn(2)], 1
    yield "teacher excludes the label", randn(7), [*randn(4), -INF, *randn(2)], 4
    yield "teacher excludes the unlikely", [*randn(6), -60.5], [*randn(6), -INF], 1
    yield "teacher excludes the impossible", [*randn(4), -1e4, -1e4, -1e4], [*randn(4), -INF, -INF, -INF], 1
    yield "teacher has one", [0.5, 2.0, -1.0], [-INF, 1.0, -INF], 1
    yield "student excludes", [*randn(4), -INF, *randn(2)], randn(7), 1
    yield "student excludes the label", [*randn(4), -INF, *randn(2)], randn(7), 4
    yield "student excludes the unlikely", [-INF, *randn(6)], [-60.5, *randn(6)], 1
    yield "student excludes the impossible", [-INF, *randn(6)], [-1e4, *randn(6)], 1
    yield "student excludes an impossible label", [-INF, *randn(6)], [-1e4, *randn(6)], 0
    yield "student has one", [-INF, 1.0, -INF], [0.5, 2.0, -1.0], 1
    yield "each excludes another", [*randn(2), -INF], [-INF, *randn(2)], 1
    yield "student excludes all", [-INF] * 3, randn(3), 1
    yield "teacher excludes all", randn(3), [-INF] * 3, 1


ROWS = {name: row for name, *row in _rows()}
ALL = list(ROWS)


def log_probs(name: str) -> tuple[Tensor, Tensor]:
    """The teacher's three likeliest entries and their ids, -inf where it excludes them."""
    z_t = torch.tensor(ROWS[name][1])
    values, indices = z_t.log_softmax(0).nan_to_num(0.0, neginf=-INF).topk(min(3, len(z_t)))
    return values, indices


def of_list(name: str, tail: str, splits_label: bool) -> tuple[list[mpf], int, Groups | None]:
    """The teacher's logits and the label over the tokens, or over the categories that ``bucket`` makes of them."""
    V, y = len(ROWS[name][0]), ROWS[name][2]
    if tail == "listed":
        values, indices = (x.tolist() for x in log_probs(name))
        entries = {i: mpf(x) for x, i in zip(values, indices, strict=True) if x > -INF}
        if splits_label:
            entries.setdefault(y, -mp.inf)
        return [*entries.values()], list(entries).index(y) if y in entries else 0, [[v] for v in entries]
    listed = {i: mpf(x) for x, i in zip(*(x.tolist() for x in log_probs(name)), strict=True) if x > -INF}
    others = [v for v in range(V) if v not in listed]
    missing = max(mpf(0), 1 - mp.fsum(mp.exp(x) for x in listed.values()))
    each = mp.log(missing / len(others)) if others and missing > 0 and tail != "renormalize" else -mp.inf
    if tail != "bucket":
        return [listed.get(v, each) for v in range(V)], y, None
    if y in others and splits_label:
        listed[y] = each
        others.remove(y)
    rest = [each + mp.log(len(others))] if others else []
    groups = [[v] for v in listed] + [others] * bool(others)
    return [*listed.values(), *rest], next((i for i, g in enumerate(groups) if y in g), 0), groups


@functools.cache
def truth(name: str, tail: str, objective: Objective, T: float) -> Exact:
    z, z_t, y = (torch.tensor(x).tolist() for x in ROWS[name])
    if tail == "dense":
        return exact(z, z_t, y, objective, T)
    spec = objective.spec
    listed = tail == "listed"
    z_t, at, groups = of_list(name, tail, spec.mixes_label if listed else spec.reads_label)
    return exact(z, z_t, at, objective, T, groups, y if listed else None)


def by_eager(z: Tensor, z_t: Tensor, y: Tensor, objective: Objective, T: float) -> Found:
    """Usual code in fp32; its label's cross-entropy is at the same temperature."""
    leaf = z.clone().requires_grad_()
    loss = eager_rows(leaf / T, z_t / T, y, objective)
    difficulty = eager_rows(z / T, z_t / T, y, fk.NoEvo(lam=getattr(objective, "lam", 1.0)))
    return Found(loss.detach(), difficulty, gradients(loss.sum(), [leaf])[0])


def wrong(run: Run, objective: Objective, T: float, tail: str, names: list[str]) -> list[str]:
    """What is off by more than 4 times eager PyTorch's error on the same row and more than a few roundings."""
    said = []
    # Lists of a row of nothing but excluded tokens have categories that are empty, and as likely as those.
    names = [name for name in names if tail == "dense" or (len(ROWS[name][0]) > 2 and not name.endswith("all"))]
    for V in sorted({len(ROWS[name][0]) for name in names}):
        chosen = [name for name in names if len(ROWS[name][0]) == V]
        z, z_t, y = (torch.tensor([ROWS[name][i] for name in chosen]) for i in range(3))
        teacher: Tensor | fk.TopK = z_t
        if tail != "dense":
            lists = [log_probs(name) for name in chosen]
            teacher = fk.TopK(*(torch.stack(x) for x in zip(*lists, strict=True)), tail)
        found, usual = run(z, teacher, y, objective, T), by_eager(z, z_t, y, objective, T)
        truths = [truth(name, tail, objective, T) for name in chosen]
        size = rounding(z, T) + rounding(z_t, T)
        for field, a in found._asdict().items():
            r = torch.tensor([[float(x) for x in _list(getattr(t, field))] for t in truths], dtype=torch.float64)
            a, e = (x.double().reshape(r.shape) for x in (a, getattr(usual, field)))
            factor = 1 / T if field == "gradient" else 1.0
            # The label's share of a gradient is taken at T = 1.
            share = own_share(objective) if field == "gradient" else 0.0
            allowed = 4 * (e - r).abs().nan_to_num(0.0, 0.0, 0.0).amax(1) + factor * size
            powers = 2**-24 * amplified(objective) if has_powers(objective) else 0.0
            floor = (FLOOR + powers) * max(factor, share)
            allowed = allowed.maximum(4e-6 * r.abs().amax(1).nan_to_num(posinf=0.0)) + floor
            off = torch.where(a == r, 0.0, (a - r).abs()).amax(1)
            off[beyond_fp32(objective, chosen, found, truths)] = 0.0
            jumps = summands(objective) & JUMPS and tail != "dense"  # where a list's p is q
            if field == "gradient" and jumps and "equal" in chosen:
                off[chosen.index("equal")] = 0.0
            for i in (~(off <= allowed)).nonzero().flatten().tolist():
                said.append(f"{field} {chosen[i]!r} {tail} T={T} {objective}: {a[i].tolist()}, not {r[i].tolist()}")
    return said


FLOOR = 1.2e-7


def rounding(z: Tensor, T: float) -> Tensor:
    """(N,): of the exponents of what is not negligible, and of the logits where they are divided by T."""
    kept = z.double().where(z > -INF, torch.nan)
    largest = kept.nan_to_num(-INF).amax(1, keepdim=True)
    spread = (largest - kept).nan_to_num(0.0).amax(1).div(T).clamp(max=100.0)
    return 2**-23 * spread + (0.0 if T == 1.0 else 2**-23 / T) * kept.nan_to_num(0.0).abs().amax(1)


def beyond_fp32(objective: Objective, names: list[str], found: Found, truths: list[Exact]) -> Tensor:
    """Rows whose loss is the logarithm of a sum that is 0 in fp32, or that has no reciprocal there; or the level of
    logits that are all -inf."""
    losses = torch.tensor([float(t.loss) for t in truths])
    logarithms = losses * (1.0 - objective.alpha if isinstance(objective, fk.Renyi) else 1.0)
    beyond = ((losses > 80.0) & (found.loss == INF)) | (logarithms > -math.log(LEAST_SUM))
    small = may_overflow(objective) & beyond
    return small | torch.tensor([reads_level(objective) and name == "student excludes all" for name in names])


def own_share(objective: Objective) -> float:
    """Of what is taken at temperature 1: cross-entropies, and the log-sum-exp."""
    terms = zip(objective.spec.terms, objective.scalars(), strict=True)
    return sum(float(s.weight * s.rest) * term.hard_label + float(s.weight) * 10.0 * term.z_loss for term, s in terms)


def _list(x: mpf | list[mpf]) -> list[mpf]:
    return x if isinstance(x, list) else [x]


def check(run: Run, cls: type[Objective], form: str, names: list[str], *, full: bool = False) -> None:
    """``full``: at other temperatures, and with each scalar at its edges."""
    temperatures = (1.0, 0.1, 100.0) if full and form in ("dense", "renormalize", "uniform", "listed") else (1.0,)
    said = [
        line
        for T in temperatures
        for objective in variants(cls, form, edges=full and T == 1.0)
        for line in wrong(run, objective, T, form, names)
    ]
    assert not said, f"{len(said)}:\n" + "\n".join(said[:30])


# Where a row takes a tenth of a second: one of each kind.
SLOW = ["plain 3", "far", "near", "subnormal", "one-hot apart", *(name for name in ALL if "exclude" in name)]


@every_way()
def test_exact(way, form, cls):
    check(way.run, cls, form, SLOW if way.slow else ALL)


@pytest.mark.exhaustive
@every_way()
def test_exact_at_other_temperatures_and_edges(way, form, cls):
    check(way.run, cls, form, ALL, full=True)


def test_the_check_sees_a_wrong_row():
    """A gradient off by 1e-5, an infinite loss that is not, and a finite one that is."""
    exact = through_the_loss(backend="torch")

    def run(change: Callable[[Found], Found]) -> list[str]:
        return wrong(lambda *arguments: change(exact(*arguments)), fk.ReverseKD(lam=0.3), 1.0, "dense", ALL)

    assert not run(lambda x: x)
    assert len(run(lambda x: x._replace(gradient=x.gradient * 1.001))) > 20
    assert len(run(lambda x: x._replace(loss=x.loss.nan_to_num(posinf=4378.0)))) >= 5
    assert len(run(lambda x: x._replace(loss=x.loss.masked_fill(x.loss < 1e4, INF)))) > 20


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_share_of_a_millionth(backend):
    """Its gradient is that of the share itself, not of what is left of it in fp32 beside 1."""
    for objective in (fk.SkewForward(alpha=1e-6), fk.SkewReverse(alpha=1 - 1e-6), fk.GeneralizedJSD(beta=1e-6)):
        assert not wrong(through_the_loss(backend=backend), objective, 1.0, "dense", ["far", "plain 0"]), objective


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_of_an_excluded_label(backend):
    """Cross-entropy with it is infinite, and has no share in this loss, whatever the teacher's form."""
    z, y = torch.tensor([[0.5, 0.1, -INF]]), torch.tensor([2])
    lists = fk.TopK(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0, 1]]), "renormalize")
    for teacher in (lists, torch.tensor([[math.log(0.7), math.log(0.3), -INF]])):
        for T, expected in ((1.0, 0.02215), (2.0, 0.00606)):
            options = {"temperature": T, "backend": backend}
            assert fk.kd_loss(z, teacher, y, fk.ForwardKD(lam=1.0), **options).loss.item() == pytest.approx(
                expected, abs=1e-5
            )
            assert fk.kd_loss(z, teacher, y, fk.ForwardKD(lam=0.9), **options).loss.item() == INF


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_underflow_is_nothing_beside_an_excluded_token(backend):
    """All at -1e4, where the teacher has -inf; and lists that add up to 1, whose rest it excludes."""
    g = torch.Generator().manual_seed(1)
    z, z_t = torch.randn(1, 20, generator=g), torch.randn(1, 20, generator=g)
    z[:, 15:], z_t[:, 15:] = -1e4, -INF
    alone = fk.kd_loss(z[:, :15], z_t[:, :15], torch.tensor([3]), fk.AdaptiveKL(), backend=backend).loss.item()
    assert fk.kd_loss(z, z_t, torch.tensor([3]), fk.AdaptiveKL(), backend=backend).loss == pytest.approx(
        alone, rel=1e-5
    )
    values, indices = torch.tensor([[0.5, 0.25, 0.25]]).log() + 1e-7, torch.tensor([[0, 1, 2]])
    z = torch.cat([torch.randn(1, 3, generator=g), torch.full((1, 17), -1e4)], 1)
    alone = fk.kd_loss(z[:, :3], values, torch.tensor([1]), fk.AdaptiveKL(), backend=backend).loss.item()
    for tail in ("uniform", "bucket"):
        listed = fk.kd_loss(z, fk.TopK(values, indices, tail), torch.tensor([1]), fk.AdaptiveKL(), backend=backend)
        assert listed.loss.item() == pytest.approx(alone, rel=1e-5)
