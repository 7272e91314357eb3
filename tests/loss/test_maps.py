"""Teachers of another vocabulary against the oracle by hand, on each row; what is refused; what is held."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_kd as fk
from fused_kd.engines import mapping
from fused_kd.engines.problem import Side
from fused_kd.inputs import TAILS
from fused_kd.reference import reference_kd_loss

from ..kernels.contract import HOSTED, cases, slow
from ..problems import CPU_BACKENDS, JUMPS, OBJECTIVES, Allocations, gradients, label, relative, summands
from .mapped import MappedProblem, by_hand, mapped_problem

TIGHT = 6e-6


def shuffled(V: int, V_t: int, unmapped: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(V_t, generator=g)[:V]
    columns[torch.randperm(V, generator=g)[:unmapped]] = -1
    return columns


MAPS = {
    "two tokenizers": (shuffled(61, 90, 17), 90),
    "a draft": (shuffled(61, 90, 0).sort().values, 90),
    "added tokens": (torch.cat([torch.arange(55), torch.full((6,), -1)]), 55),
    "a padded teacher": (torch.arange(61), 90),
    "one unmapped": (shuffled(61, 90, 1), 90),
}
SINGLE = [objective for objective in OBJECTIVES if len(summands(objective)) == 1]


def run(p: MappedProblem, objective, tail: str, *, sides=({}, {}), **options):
    out = fk.kd_loss(p.student(**sides[0]), p.teacher(tail, **sides[1]), p.labels, objective, **options)
    return out, gradients(out.loss, p.leaves)


@functools.cache
def oracle(name: str, N: int, objective, tail: str, T: float):
    """What the backends share."""
    return by_hand(mapped_problem(*MAPS[name], N=N), objective, tail, T)


def agree(name: str, objective, tail: str, tight: float = TIGHT, *, N: int = 8, T: float = 1.0, backend="torch"):
    """With the oracle, or an infinite loss on both sides; or refused where all losses are infinite."""
    p, (loss, difficulty, grads) = mapped_problem(*MAPS[name], N=N), oracle(name, N, objective, tail, T)
    try:
        out, actual = run(p, objective, tail, temperature=T, backend=backend)
    except ValueError as error:
        assert "tail must be" in str(error)
        reads_all = any(term.z_loss for term in objective.spec.terms)
        assert loss == math.inf or difficulty.max() == math.inf or reads_all
        return
    if loss == math.inf:
        assert out.loss == math.inf
        return
    assert relative(out.loss, loss) < tight
    jumps = 4 if summands(objective) & JUMPS else 1
    for which, a, b in zip(("dH", "dW", "db"), actual, grads, strict=False):
        assert relative(a, b) < tight * jumps, which
    reference = reference_kd_loss(p.student(), p.teacher(tail), p.labels, objective, temperature=T)
    assert relative(reference.loss, loss) < 1e-9
    valid = p.labels != -100
    assert relative(reference.difficulty[valid], difficulty) < 1e-9 or difficulty.max() == math.inf
    finite = difficulty.isfinite()
    assert torch.equal(out.difficulty[valid].isfinite(), finite)
    assert relative(out.difficulty[valid][finite], difficulty[finite]) < tight


# In the interpreter: all tails of a map; what leaves a kernel no rest, or the label alone in it.
IN_THE_INTERPRETER = [*(("two tokenizers", tail) for tail in TAILS), ("a draft", "bucket"), ("one unmapped", "bucket")]
ORACLE = cases(list(MAPS), TAILS, backends=HOSTED, few=lambda *cell: cell in IN_THE_INTERPRETER)


@pytest.mark.parametrize("name, tail, backend", ORACLE)
def test_equals_the_oracle(name, tail, backend):
    """Objectives of each kind: free, skewed, gated, a hard label apart, both directions, an outer function."""
    chosen = [
        fk.NoEvo(lam=0.6), fk.ForwardKD(lam=0.3), fk.ReverseKD(lam=0.6), fk.SelfEvolution(gamma=2.0, lam=0.7),
        fk.GeneralizedJSD(0.3), fk.TotalVariation(), fk.Acceptance(), fk.SkewTeacher(lam=0.5),
    ]  # fmt: skip
    for objective in chosen[:: 3 if slow(backend) else 1]:
        agree(name, objective, tail, N=5 if slow(backend) else 8, backend=backend)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("objective", SINGLE, ids=label)
def test_every_objective(objective, tail):
    if objective.spec.ranked or not objective.spec.needs_teacher:
        pytest.skip("has no row of its own")
    for name in ("two tokenizers", "a draft") if tail in ("renormalize", "bucket") else ("two tokenizers",):
        agree(name, objective, tail, 2e-5)


@pytest.mark.parametrize("objective", [fk.NoEvo(), fk.ForwardKD(lam=0.4), fk.GeneralizedJSD(0.4)], ids=label)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_temperatures(objective, tail, backend):
    """A category is exact at any: its mass comes from the logits."""
    for T in (0.7, 3.0):
        agree("two tokenizers", objective, tail, T=T, backend=backend)


@pytest.mark.parametrize("tail", TAILS)
def test_scale_softcap_and_bias(tail):
    p = mapped_problem(*MAPS["two tokenizers"], bias=True)
    loss, _, grads = by_hand(p, fk.NoEvo(), tail, softcaps=(8.0, 5.0), scales=(0.7, 1.3))
    sides = {"softcap": 8.0, "logit_scale": 0.7}, {"softcap": 5.0, "logit_scale": 1.3}
    out, actual = run(p, fk.NoEvo(), tail, sides=sides)
    assert relative(out.loss, loss) < TIGHT
    assert max(relative(a, b) for a, b in zip(actual, grads, strict=True)) < TIGHT


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tail, dtype):
    """One rounding of the results."""
    p = mapped_problem(*MAPS["two tokenizers"], dtype=dtype)
    loss, _, grads = by_hand(p, fk.SkewForward(0.2), tail)
    out, actual = run(p, fk.SkewForward(0.2), tail)
    assert relative(out.loss, loss) < 1e-5
    assert max(relative(a, b) for a, b in zip(actual, grads, strict=True)) < (4e-3 if dtype == torch.bfloat16 else 6e-4)


@pytest.mark.parametrize("tail", TAILS)
def test_a_common_offset_changes_nothing(tail):
    """Of either side: the digits of what is not mapped do not drown in it."""
    p = mapped_problem(*MAPS["two tokenizers"], bias=True)
    p.bias, p.bias_t = torch.full((61,), 4096.0, requires_grad=True), torch.full((90,), 4096.0)
    p.hidden.data, p.weight.data = (x.bfloat16().float() for x in (p.hidden.data, p.weight.data))
    plain = MappedProblem(p.hidden, p.weight, p.hidden_t, p.weight_t, p.columns, p.labels)
    loss, _, grads = by_hand(plain, fk.NoEvo(), tail)
    out, actual = run(p, fk.NoEvo(), tail)
    assert relative(out.loss, loss) < 2e-3  # a logit of 4096 has steps of 5e-4
    assert relative(actual[0], grads[0]) < 2e-3


@pytest.mark.parametrize("tail", TAILS)
def test_ways_of_reduction_and_chunks(tail):
    """Token weights, "none", chunks of a few tokens and temperatures of tokens give what each token alone does."""
    p = mapped_problem(*MAPS["two tokenizers"], N=23)
    weights, T = torch.rand(23) + 0.1, torch.rand(23) + 0.7
    objective = fk.SelfEvolution(gamma=2.0)
    student, teacher = p.student(), p.teacher(tail)
    each = [
        fk.kd_loss(
            fk.LMHead(p.hidden[i : i + 1], p.weight),
            fk.LMHead(p.hidden_t[i : i + 1], p.weight_t, columns=p.columns, tail=tail),
            p.labels[i : i + 1], objective, reduction="sum", temperature=float(T[i]),
        ).loss
        for i in range(23)
    ]  # fmt: skip
    expected = torch.stack(each) * weights
    options = {"temperature": T, "token_weights": weights, "memory_budget": 1 << 20}
    none = fk.kd_loss(student, teacher, p.labels, objective, reduction="none", **options).loss
    assert relative(none, expected) < TIGHT
    total = fk.kd_loss(student, teacher, p.labels, objective, reduction="sum", **options).loss
    grads = [gradients(x, p.leaves) for x in (none.sum(), total, expected.sum())]
    assert max(relative(a, b) for own in grads[:2] for a, b in zip(own, grads[2], strict=True)) < TIGHT


def test_vocab_size_cuts_the_student_and_the_map():
    """The teacher's normaliser stays whole: what the cut takes away of the map is the rest's."""
    columns, V_t = MAPS["two tokenizers"]
    p = mapped_problem(columns, V_t)
    p.labels = p.labels.clamp(max=49)
    cut = MappedProblem(p.hidden, p.weight, p.hidden_t, p.weight_t, columns[:50], p.labels)
    for tail in TAILS:
        a, grads = run(p, fk.SkewReverse(0.3), tail, vocab_size=50)
        loss, _, expected = by_hand(cut, fk.SkewReverse(0.3), tail)
        assert relative(a.loss, loss) < TIGHT
        assert max(relative(x, y) for x, y in zip(grads, expected, strict=True)) < TIGHT


def test_the_identity_is_no_map():
    p = mapped_problem(torch.arange(61), 61)
    plain = fk.kd_loss(p.student(), fk.LMHead(p.hidden_t, p.weight_t), p.labels, fk.NoEvo())
    for tail in ("renormalize", "uniform", "listed"):
        assert relative(run(p, fk.NoEvo(), tail)[0].loss, plain.loss) < 1e-6


def test_listed_is_renormalize_where_all_is_mapped():
    p = mapped_problem(*MAPS["a draft"])
    a, b = (run(p, fk.NoEvo(), tail) for tail in ("renormalize", "listed"))
    assert torch.equal(a[0].loss, b[0].loss) and all(map(torch.equal, a[1], b[1]))


def test_acceptance_of_a_draft_is_that_of_the_whole_vocabulary():
    """Sum min(p, q) with the draft's q 0 where it has no column: what speculative decoding accepts."""
    p = mapped_problem(*MAPS["a draft"])
    q = torch.zeros(19, 90, dtype=torch.float64)
    q[:, p.columns] = (p.hidden.double() @ p.weight.double().T).softmax(-1).detach()
    accepted = torch.minimum(q, (p.hidden_t.double() @ p.weight_t.double().T).softmax(-1)).sum(-1)
    labels = p.labels.clamp(min=0)
    told = fk.kd_loss(p.student(), p.teacher("bucket"), labels, fk.Acceptance(), reduction="none").loss
    assert relative((-told).exp(), accepted) < TIGHT
    told = fk.kd_loss(p.student(), p.teacher("bucket"), labels, fk.TotalVariation(), reduction="none").loss
    assert relative(1 - told, accepted) < TIGHT


def test_a_sum_and_a_ranked_objective():
    p = mapped_problem(*MAPS["two tokenizers"])
    parts = [run(p, each, "bucket")[0].loss for each in (fk.NoEvo(), fk.ReverseKD(lam=0.9))]
    total = run(p, 0.4 * fk.NoEvo() + 0.6 * fk.ReverseKD(lam=0.9), "bucket")[0].loss
    assert relative(total, 0.4 * parts[0] + 0.6 * parts[1]) < TIGHT
    ranked = run(p, fk.SelfEvolutionTopK(fraction=0.3), "bucket")[0]
    valid = p.labels != -100
    limit = ranked.difficulty[valid].sort(descending=True).values[math.ceil(0.3 * int(valid.sum())) - 1]
    assert torch.equal(ranked.is_hard, (ranked.difficulty >= limit) & valid)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_cover_a_map(data):
    """Each mapped column once, from its own row of the teacher; all of the teacher's once, in tiles."""
    V, V_t = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60))
    start = data.draw(st.integers(0, max(V_t - 1, 0)))
    columns = torch.arange(start, start + V)
    columns[columns >= V_t] = -1
    for j in data.draw(st.lists(st.integers(0, V - 1), max_size=4)):
        columns[j] = -1
    order = torch.tensor(data.draw(st.permutations(range(V)))) if data.draw(st.booleans()) else torch.arange(V)
    columns = columns[order]
    if bool((columns < 0).all()):
        return
    step, mapping_long = data.draw(st.integers(1, 9)), mapping.LONG
    mapping.LONG = data.draw(st.integers(1, 6))
    try:
        found = torch.full((V,), -1)
        for piece in mapping._pieces(columns, step, columns.device):
            rows = torch.arange(V_t)[piece.rows]
            own = columns[piece.columns]
            assert len(rows) <= step
            assert torch.equal(rows[own >= 0], own[own >= 0])
            found[piece.columns] = torch.where(own >= 0, rows, -1)
        assert torch.equal(found, columns)
    finally:
        mapping.LONG = mapping_long
    place = torch.full((V_t,), -1)
    place[columns[columns >= 0]] = (columns >= 0).nonzero().squeeze(1)
    seen = torch.zeros(V_t, dtype=torch.int64)
    for tile in mapping._tiles(place, step, columns.device):
        seen[tile.rows] += 1
        assert torch.equal(columns[tile.columns], torch.arange(V_t)[tile.rows][tile.places])
    assert bool((seen == 1).all())


def test_a_map_is_looked_at_once_and_again_where_it_changes():
    columns = torch.arange(6)
    side = Side(torch.randn(2, 3), torch.randn(9, 3), columns=columns, tail="bucket")
    first = mapping.mapping_of(side, 6)
    assert mapping.mapping_of(side, 6) is first
    columns[2] = -1
    assert mapping.mapping_of(side, 6).unmapped.tolist() == [2]
    columns[2] = 17
    with pytest.raises(ValueError, match=r"columns must be in \[0, 9\) or -1, got 17 at 2"):
        mapping.mapping_of(side, 6)


H, W, H_T, W_T, LABELS = torch.randn(3, 4), torch.randn(7, 4), torch.randn(3, 5), torch.randn(11, 5), torch.arange(3)


def call(columns, tail="renormalize", objective=None, **options):
    teacher = fk.LMHead(H_T, W_T, columns=columns, tail=tail)
    return fk.kd_loss(fk.LMHead(H, W), teacher, LABELS, objective or fk.NoEvo(), **options)


FULL, PART = torch.arange(7), torch.tensor([0, 1, 2, -1, 4, 5, 6])
MESSAGES = [
    (ValueError, "columns must be in [0, 11) or -1, got 11 at 3", lambda: call(torch.tensor([0, 1, 2, 11, 4, 5, 6]))),
    (ValueError, "columns must be in [0, 11) or -1, got -2 at 0", lambda: call(torch.tensor([-2, 1, 2, 3, 4, 5, 6]))),
    (ValueError, "got 2 at 2 and at 6", lambda: call(torch.tensor([0, 1, 2, 3, 4, 5, 2]))),
    (ValueError, "must map at least one", lambda: call(torch.full((7,), -1))),
    (ValueError, "columns must have the student's 7 entries, got 6", lambda: call(torch.arange(6))),
    (TypeError, "columns must be an int64 or int32 tensor, got torch.float32", lambda: call(torch.arange(7.0))),
    (TypeError, "columns must be an int64 or int32 tensor, got list", lambda: call([0, 1])),
    (ValueError, "columns must have shape", lambda: call(torch.zeros(7, 1, dtype=torch.int64))),
    (ValueError, "'bucket', 'listed', got 'ignore'", lambda: call(FULL, "ignore")),
    (ValueError, "tail must be 'bucket', 'uniform' or 'listed'", lambda: call(PART, objective=fk.ReverseKD())),
    (ValueError, "has none for the rest", lambda: call(FULL, "bucket")),
    (ValueError, "ZLoss reads all logits", lambda: call(PART, "bucket", fk.NoEvo() + fk.ZLoss())),
    (ValueError, "engine='streaming' takes no columns", lambda: call(FULL, engine="streaming")),
    (ValueError, "statistics must be empty with columns", lambda: call(FULL, statistics=("kl",))),
    (ValueError, "student must have no columns",
     lambda: fk.kd_loss(fk.LMHead(H, W, columns=FULL), fk.LMHead(H_T, W_T), LABELS, fk.NoEvo())),
]  # fmt: skip


@pytest.mark.parametrize("kind, message, bad", MESSAGES, ids=[m for _, m, _ in MESSAGES])
def test_messages(kind, message, bad):
    with pytest.raises(kind) as error:
        bad()
    assert message in str(error.value)


def test_a_map_object_is_its_columns():
    whole = fk.VocabMap.of_columns(range(7), 11)
    assert torch.equal(call(whole).loss, call(FULL).loss)
    with pytest.raises(ValueError, match="columns must be of a teacher of at most weight's V=11 columns, got 12"):
        call(fk.VocabMap.of_columns(range(7), 12))
    with pytest.raises(ValueError, match="tail must be 'renormalize' without columns, got 'bucket'"):
        fk.LMHead(H_T, W_T, tail="bucket")


@pytest.mark.parametrize("change", ["version", "data", "inference"])
def test_a_map_that_changes_in_place_is_looked_at_again(change):
    p = mapped_problem(*MAPS["two tokenizers"])
    other = MappedProblem(p.hidden, p.weight, p.hidden_t, p.weight_t, p.columns.roll(1), p.labels)
    expected = run(other, fk.NoEvo(), "bucket")[0].loss
    with torch.inference_mode(change == "inference"):
        p.columns = p.columns.clone()
        before = fk.kd_loss(p.student(), p.teacher("bucket"), p.labels, fk.NoEvo()).loss
        (p.columns.data if change == "data" else p.columns).copy_(other.columns)
        after = fk.kd_loss(p.student(), p.teacher("bucket"), p.labels, fk.NoEvo()).loss
    assert before != after and relative(after, expected) < 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_that_excludes_all_that_is_mapped(tail):
    """There is no p over the mapped columns; what is beside them has all of it."""
    p = mapped_problem(torch.tensor([0, 1, -1, -1]), 6, bias=True)
    p.bias_t = torch.tensor([-math.inf, -math.inf, 0.0, 0.0, 0.0, 0.0])
    loss = fk.kd_loss(p.student(), p.teacher(tail), p.labels, fk.TotalVariation()).loss
    assert loss.isnan() == (tail in ("renormalize", "listed"))
    if tail == "bucket":
        assert relative(loss, by_hand(p, fk.TotalVariation(), tail)[0]) < TIGHT


def test_int32_columns_and_repr():
    assert torch.equal(call(FULL.int()).loss, call(FULL).loss)
    assert "columns=(7,), tail='bucket'" in repr(fk.LMHead(H_T, W_T, columns=FULL, tail="bucket"))


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_of_the_teachers_width_is_held(tail, monkeypatch):
    """The largest tensor is the student's chunk or a slab: no logits of the teacher's vocabulary, no second head."""
    from fused_kd.engines import gemm

    monkeypatch.setattr(gemm, "SLAB_BYTES", 1 << 16)
    monkeypatch.setattr(mapping, "CPU_COLUMNS", 256)
    V, V_t, N = 400, 3000, 64
    p = mapped_problem(shuffled(V, V_t, 40), V_t, N=N, H=32, H_t=64)
    p.labels = p.labels.clamp(min=0)
    with Allocations() as seen:
        run(p, fk.SkewForward(0.2), tail)
    assert seen.largest <= max(N * (V + 1) * 4, 1 << 16) < min(N * V_t * 4, p.weight_t.nbytes)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_compiles_whole(tail):
    p = mapped_problem(*MAPS["two tokenizers"])

    def step(hidden, weight, hidden_t, weight_t, columns, labels):
        teacher = fk.LMHead(hidden_t, weight_t, columns=columns, tail=tail)
        return fk.kd_loss(fk.LMHead(hidden, weight), teacher, labels, fk.NoEvo()).loss

    given_ = (p.hidden, p.weight, p.hidden_t, p.weight_t, p.columns, p.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*given_)
    plain = step(*given_)
    assert relative(compiled, plain) < 1e-6
    assert (
        max(relative(a, b) for a, b in zip(gradients(compiled, p.leaves), gradients(plain, p.leaves), strict=True))
        < 1e-6
    )
