"""``python -m tests.engines.parallel_worker OUT P``: P processes divide a vocabulary; OUT gets their errors as JSON.

Everything is imported once, then the processes are forked. Each case is a function of the rank's world; the numbers
that it returns by name are reduced to the largest over the ranks. tests/kernels/test_sharded_row.py crosses all
objectives and teachers' forms within one process; here each is met once, and every option by objectives that differ in
messages.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_kd as fk
from fused_kd import parallel
from fused_kd.engines.sharded import exchange
from fused_kd.terms import ENTROPY

from ..kernels.test_lists import cached
from ..problems import OBJECTIVES, Problem, label, oracle64, problem, relative, worst

V, N = 517, 29
TIGHT = 3e-6  # fp32 rounding of sums in another order
WIDTHS = {2: (100, 417), 4: (100, 1, 216, 200)}
FORMS = ("heads", "logits", "renormalize", "bucket", "uniform", "listed")
# name: options of the loss and of the heads
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut": {"vocab_size": 90},  # within the first slice: the others have none
    "chunks": {"memory_budget": 250_000},
    "sum": {"reduction": "sum", "token_weights": True},
    "none": {"reduction": "none"},
    "items": {"num_items": 100.0},
    "shift": {"shift": True},
    "cold": {"temperature": 2.0},
    "capped": {"softcap": 3.0, "logit_scale": 0.5},
}
WITH_EVERY_OBJECTIVE = ("plain", "cut")
ANY = fk.SelfEvolution(gamma=1.0)


@dataclass
class World:
    rank: int
    size: int

    @property
    def group(self) -> Any:
        return dist.group.WORLD

    def columns(self) -> slice:
        widths = WIDTHS[self.size]
        return slice(sum(widths[: self.rank]), sum(widths[: self.rank + 1]))

    def own(self, *whole: Tensor | None) -> list[Tensor]:
        """Leaves of one's own: hidden states, then rows of what has a row a token of the vocabulary."""
        hidden, *rows = (x.detach() for x in whole if x is not None)
        return [x.clone().requires_grad_() for x in (hidden, *(x[self.columns()] for x in rows))]

    def teacher(self, p: Problem) -> fk.LMHead:
        return fk.LMHead(p.hidden_t, p.weight_t[self.columns()])


# No rank sees the teacher's entropy.
SHARDED = [objective for objective in OBJECTIVES if objective.spec.gate != ENTROPY]


def matrix() -> dict[str, tuple[Any, str, str]]:
    """Objective, teacher form and variant of each case of the matrix."""
    cells = [(objective, "heads", variant) for objective in SHARDED for variant in WITH_EVERY_OBJECTIVE]
    cells += [(ANY, form, variant) for form in FORMS for variant in WITH_EVERY_OBJECTIVE]
    cells += [(ANY, "renormalize", variant) for variant in VARIANTS]
    cells += [(fk.ForwardKD(), "listed", variant) for variant in ("plain", "cold")]
    cells += [(fk.ReverseKD(), form, "cold") for form in ("listed", "uniform")]
    for objective in (ANY, fk.SelfEvolutionTopK(), fk.ForwardKD(), fk.GeneralizedJSD()):
        cells += [(objective, "heads", variant) for variant in VARIANTS]
    return {f"{label(objective)}/{form}/{variant}": (objective, form, variant) for objective, form, variant in cells}


def run_case(world: World, objective: Any, form: str, variant: str) -> dict[str, float]:
    """Errors of a slice's gradients are of the whole gradient's norm: a single column may have next to nothing."""
    options = dict(VARIANTS[variant])
    head = {key: options.pop(key) for key in ("softcap", "logit_scale") if key in options}
    p = problem(N, V=V, bias=True, std=2.0)
    upstream = torch.rand(N, generator=torch.Generator().manual_seed(1))
    if options.pop("token_weights", False):
        options["token_weights"] = upstream
    vocab = options.get("vocab_size", V)
    labels = torch.where(p.labels >= vocab, 7, p.labels)
    reach = p if vocab == V else Problem(p.hidden, p.weight, p.bias, p.hidden_t, p.weight_t[:vocab], labels)

    def sides(mine: slice, leaves: list[Tensor]) -> tuple[Any, Any]:
        hidden, weight, bias = leaves
        student: Any = fk.LMHead(hidden, weight, bias, **head)
        teacher: Any = fk.LMHead(p.hidden_t, p.weight_t[mine])
        if form == "logits":
            student, teacher = student.hidden @ weight.T + bias, p.hidden_t @ p.weight_t[mine].T
        elif form != "heads":
            torch.manual_seed(0)
            teacher = cached(reach, 5, form)
        return student, teacher if objective.spec.needs_teacher else None

    def loss_and_gradients(mine: slice, **more: Any) -> tuple[fk.KDOutput, list[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in (p.hidden, p.weight[mine], p.bias[mine])]
        out = fk.kd_loss(*sides(mine, leaves), labels, objective, **options, **more)
        (out.loss if out.loss.dim() == 0 else out.loss @ upstream).backward()
        if form == "logits" and "tp_group" in more:  # of one's own columns; the head's hidden states saw no other
            dist.all_reduce(leaves[0].grad)
        return out, [leaf.grad for leaf in leaves]

    own = world.columns()
    expected, whole = loss_and_gradients(slice(0, V), backend="torch")
    with parallel.count_traffic() as traffic:
        out, grads = loss_and_gradients(own, tp_group=world.group)
    found = {
        "loss": relative(out.loss, expected.loss),
        "difficulty": float((out.difficulty - expected.difficulty).abs().max()),
        "is_hard": float((out.is_hard != expected.is_hard).sum()),
        "unequal": float(unequal(torch.cat([out.loss.detach().flatten(), out.difficulty.flatten()]))),
        "messages": float(traffic.messages),
    }
    for name, grad, ref in zip(("hidden", "weight", "bias"), grads, whole, strict=True):
        mine = ref if name == "hidden" else ref[own]
        found[name] = float((grad - mine).norm() / ref.norm())
    return found


def unequal(x: Tensor) -> bool:
    """Whether the ranks' bits differ."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    return any(not torch.equal(x, other) for other in everyone)


def against_the_oracle(world: World, p: Problem, objective: Any, **options: Any) -> dict[str, float]:
    """Errors of a slice's gradients are of the whole gradient's norm."""
    leaves, teacher = world.own(*p.leaves), world.teacher(p) if objective.spec.needs_teacher else None
    loss = fk.kd_loss(fk.LMHead(*leaves), teacher, p.labels, objective, tp_group=world.group, **options).loss
    loss.backward()
    expected, refs = oracle64(p, objective)
    found = {"loss": relative(loss, expected.loss), "hidden": relative(leaves[0].grad, refs[0])}
    for name, leaf, ref in zip(("weight", "bias"), leaves[1:], refs[1:], strict=False):
        found[name] = float((leaf.grad - ref[world.columns()]).norm() / ref.norm())
    return found


def low_precision(world: World) -> dict[str, float]:
    return against_the_oracle(world, problem(N, V=V, bias=True, dtype=torch.bfloat16), fk.SelfEvolution())


def kernels(world: World) -> dict[str, float]:
    """Triton's sweeps, in its interpreter; each takes half a second a rank."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return {"loss": 0.0}
    found = {}
    for objective in (fk.SFT(), ANY, fk.SelfEvolutionTopK()):
        errors = against_the_oracle(world, problem(6, V=V), objective, backend="triton")
        found.update({f"{label(objective)} {name}": error for name, error in errors.items()})
    return found


def nothing_valid(world: World) -> dict[str, float]:
    p = problem(N, V=V)
    hidden, weight = world.own(p.hidden, p.weight)
    criterion = fk.KDLoss(fk.SelfEvolution(), tp_group=world.group)
    loss = criterion(fk.LMHead(hidden, weight), world.teacher(p), torch.full((N,), -100))
    loss.backward()
    return {"loss": float(loss), "hidden": float(hidden.grad.norm()), "weight": float(weight.grad.norm())}


def twice_and_annealed(world: World) -> dict[str, float]:
    """A second backward of one graph, and an objective that changes between calls."""
    p, own = problem(N, V=V), world.columns()
    hidden, weight = world.own(p.hidden, p.weight)
    criterion = fk.KDLoss(fk.SelfEvolution(beta=0.9), tp_group=world.group)
    loss = criterion(fk.LMHead(hidden, weight), world.teacher(p), p.labels)
    criterion.objective = fk.SelfEvolution(beta=0.2)
    loss.backward(retain_graph=True)
    first = [hidden.grad.clone(), weight.grad.clone()]
    loss.backward()
    found = {f"again{i}": relative(x.grad, 2 * g) for i, (x, g) in enumerate(zip((hidden, weight), first, strict=True))}
    refs = oracle64(p, fk.SelfEvolution(beta=0.9))[1]
    found |= {"hidden": relative(first[0], refs[0]), "weight": relative(first[1], refs[1][own])}
    later = criterion(fk.LMHead(hidden, weight), world.teacher(p), p.labels)
    return found | {"annealed": relative(later, oracle64(p, fk.SelfEvolution(beta=0.2))[0].loss)}


def dtensors(world: World) -> dict[str, float]:
    """Weights ``Shard(0)`` and ``Replicate``, hidden states plain, replicated and divided over tokens."""
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
    p = problem(N, V=V, bias=True)
    expected, refs = oracle64(p, fk.SelfEvolution())
    found = {}
    for place in (Shard(0), Replicate()):
        for where in (None, Replicate(), Shard(0)):
            weight, bias = (
                distribute_tensor(x.detach().clone(), mesh, [place]).requires_grad_() for x in (p.weight, p.bias)
            )
            hidden: Tensor = p.hidden.detach().clone()
            if where is not None:
                hidden = distribute_tensor(hidden, mesh, [where])
            hidden.requires_grad_()
            teacher = fk.LMHead(p.hidden_t, distribute_tensor(p.weight_t, mesh, [Shard(0)]))
            criterion = fk.KDLoss(fk.SelfEvolution(), tp_group=mesh)
            with parallel.count_traffic() as traffic:
                loss = criterion(fk.LMHead(hidden, weight, bias), teacher, p.labels)
            loss.backward()
            title = f"{place}-{where}"
            whole_grad = hidden.grad if where is None else hidden.grad.full_tensor()
            found[f"{title} loss"] = relative(loss, expected.loss)
            found[f"{title} hidden"] = relative(whole_grad, refs[0])
            found[f"{title} weight"] = relative(weight.grad.full_tensor(), refs[1])
            found[f"{title} bias"] = relative(bias.grad.full_tensor(), refs[2])
            # divided over tokens, the hidden gradient is scattered by its own backward
            found[f"{title} summed here"] = float((traffic.hidden > 0) == (where == Shard(0)))
            if weight.grad.placements != (place,) and place == Shard(0):
                found[f"{title} placement"] = 1.0
    return found


class Tiny(nn.Module):
    """An embedding, a linear body and a head; ``forward`` gives the loss, as under a sharding wrapper it must."""

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 41, bias=False)
        self.criterion = criterion

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))

    def forward(self, ids: Tensor, labels: Tensor, teacher: fk.LMHead, num_items: float) -> Tensor:
        assert self.criterion is not None
        return self.criterion(fk.LMHead(self.hidden(ids), self.lm_head.weight), teacher, labels, num_items=num_items)


def two_dimensions(world: World) -> dict[str, float]:
    """A tensor-parallel plan's head beside FSDP2, on a mesh of data by vocabulary ranks; one has no valid token."""
    data = max(world.size // 2, 1)
    mesh = init_device_mesh("cpu", (data, world.size // data), mesh_dim_names=("dp", "tp"))
    g = torch.Generator().manual_seed(2)
    ids, labels = (torch.randint(0, 40, (4, 6), generator=g) for _ in range(2))
    labels[-2:] = -100  # all that the last data rank has
    hidden_t, weight_t = torch.randn(4, 6, 8, generator=g), torch.randn(41, 8, generator=g)
    items = float((labels != -100).sum())
    torch.manual_seed(3)
    alone = Tiny(fk.KDLoss(fk.SelfEvolution(), backend="torch"))
    alone(ids, labels, fk.LMHead(hidden_t, weight_t), items).backward()

    torch.manual_seed(3)
    model = Tiny(fk.KDLoss(fk.SelfEvolution(), tp_group=mesh["tp"]))
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel()})
    if data > 1:
        fully_shard(model, mesh=mesh["dp"])
    rows = slice(4 // data * mesh["dp"].get_local_rank(), 4 // data * (mesh["dp"].get_local_rank() + 1))
    teacher = fk.LMHead(hidden_t[rows], distribute_tensor(weight_t, mesh["tp"], [Shard(0)]))
    model(ids[rows], labels[rows], teacher, items / data).backward()  # FSDP averages over the data ranks
    found = {}
    for (name, expected), (_, parameter) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        grad = parameter.grad
        found[name] = relative(grad.full_tensor() if isinstance(grad, DTensor) else grad, expected.grad)
    return found


def refusals(world: World) -> dict[str, float]:
    """What is refused, on all ranks alike; 0 where it is, and the message names what it should."""
    p, own = problem(N, V=V), world.columns()
    even = slice(V * world.rank // world.size, V * (world.rank + 1) // world.size)
    hidden, weight, objective = p.hidden.detach(), p.weight.detach(), fk.NoEvo()

    def call(weight_s: Tensor = weight[own], weight_t: Tensor = p.weight_t[own], **options: Any) -> None:
        student, teacher = fk.LMHead(hidden, weight_s), fk.LMHead(p.hidden_t, weight_t)
        fk.kd_loss(student, teacher, p.labels, objective, **{"tp_group": world.group, **options})

    grid = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("dp", "tp"))
    divided = distribute_tensor(weight, grid["tp"], [Shard(1)])
    kept = distribute_tensor(weight, grid["tp"], [Shard(0)])
    padded = torch.cat([p.weight_t, p.weight_t[:3]])[V if world.rank else 0 : V + 3 if world.rank else V]
    cases = {
        "divided at the same tokens": lambda: call(weight_t=p.weight_t[even]),
        "vocab_size must be at most 517": lambda: call(vocab_size=518),
        "unequal vocabularies, 517 and": lambda: call(weight_t=padded),
        "backend must be None, 'torch' or 'triton' with tp_group": lambda: call(backend="native"),
        "engine must be None or 'chunked' with tp_group": lambda: call(engine="streaming"),
        "mesh of one dimension": lambda: call(tp_group=grid),
        "must be a process group or a device mesh, got str": lambda: call(tp_group="world"),
        "labels must be in [0, 400)": lambda: call(vocab_size=400),
        "Shard(0) or Replicate over tp_group": lambda: call(divided, tp_group=grid["tp"]),
        "only with tp_group": lambda: call(kept, p.weight_t, tp_group=None),
    }
    found = {}
    for message, attempt in cases.items():
        try:
            attempt()
            found[message] = 1.0
        except (ValueError, TypeError) as error:
            found[message] = 0.0 if message in str(error) else 2.0
    return found


def resharded(world: World) -> dict[str, float]:
    """From uneven slices to even ones, and from these to the first 100 rows of each."""
    full = torch.arange(V * 3, dtype=torch.float32).view(V, 3)
    even, few = [V // world.size] * world.size, [min(width, 100) for width in WIDTHS[world.size]]

    def rows(widths: list[int]) -> Tensor:
        return full[sum(widths[: world.rank]) :][: widths[world.rank]]

    moved = parallel.shard_rows(full[world.columns()], even, world.group)
    back = parallel.shard_rows(rows(even), few, world.group)
    return {"moved": float(not torch.equal(moved, rows(even))), "back": float(not torch.equal(back, rows(few)))}


def traffic(world: World) -> dict[str, float]:
    """Counted bytes against what the collectives were really given, and against the prediction."""
    real = {"gather": 0.0, "sum": 0.0}
    gather, reduce = exchange._all_gather, dist.all_reduce

    def counting_gather(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        assert out.numel() == world.size * x.numel()
        real["gather"] += (out.numel() - x.numel()) * x.element_size()
        return gather(out, x, **kwargs)

    def counting_reduce(x: Tensor, **kwargs: Any) -> Any:
        real["sum"] += 2 * x.numel() * x.element_size() * (world.size - 1) / world.size
        return reduce(x, **kwargs)

    found = {}
    exchange._all_gather, dist.all_reduce = counting_gather, counting_reduce
    try:
        for objective, swept in ((fk.SFT(), 0.0), (fk.NoEvo(), 0.0), (fk.Skew(), 1.0), (fk.SelfEvolution(), None)):
            real.update(gather=0.0, sum=0.0)
            p = problem(N, V=V)
            teacher = None if objective.name == "sft" else world.teacher(p)
            with parallel.count_traffic() as counted:
                head = fk.LMHead(*world.own(p.hidden, p.weight))
                out = fk.kd_loss(head, teacher, p.labels, objective, tp_group=world.group)
                out.loss.backward()
            valid = int((p.labels != -100).sum())
            share = float(out.is_hard.sum()) / valid if swept is None else swept
            said = parallel.predicted_traffic(
                valid, p.hidden.shape[1], world.size, swept=share, teacher=teacher is not None
            )
            apart = abs(counted.statistics - real["gather"]) + abs(counted.hidden - real["sum"])
            found[f"{label(objective)} counted"] = apart
            found[f"{label(objective)} predicted"] = abs(counted.total - said.total)
            found[f"{label(objective)} nothing"] = float(counted.statistics == 0.0 or counted.hidden == 0.0)
    finally:
        exchange._all_gather, dist.all_reduce = gather, reduce
    return found


def compiled(world: World) -> dict[str, float]:
    p = problem(N, V=V)
    hidden, weight = world.own(p.hidden, p.weight)
    criterion, teacher = fk.KDLoss(fk.SelfEvolution(), tp_group=world.group), world.teacher(p)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return criterion(fk.LMHead(h, w), teacher, p.labels)

    loss, again = (f(hidden, weight) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    expected, found = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, again))
    gradients = {f"g{i}": relative(x, y) for i, (x, y) in enumerate(zip(found, expected, strict=True))}
    return {"loss": abs(float(again) - float(loss)), **gradients}


def lists(world: World) -> dict[str, float]:
    """Made from a head or logits in slices, some of them narrower than the list or cut off whole."""
    p, own = problem(N, V=V, bias=True), world.columns()
    hidden, weight, bias = (x.detach() for x in (p.hidden, p.weight, p.bias))
    z = hidden @ weight.T + bias
    sides = {"head": (fk.LMHead(hidden, weight[own], bias[own]), fk.LMHead(hidden, weight, bias)), "z": (z[:, own], z)}
    ids = torch.stack([torch.randperm(90)[:5] for _ in range(N)])
    ids[3, 2:] = -1
    found = {}
    for name, (mine, whole) in sides.items():
        for title, options in (("", {}), ("cut", {"vocab_size": 90}), ("warm", {"temperature": 2.0})):
            cut = {} if title == "cut" else {"top_p": 0.8}
            made, expected = (
                (*fk.top_k_of(side, 12, return_log_sum_exp=True, **cut, **options, **group),
                 *fk.log_probs_at(side, ids, return_log_sum_exp=True, **options, **group))
                for side, group in ((mine, {"tp_group": world.group}), (whole, {}))
            )  # fmt: skip
            for i, (a, b) in enumerate(zip(made, expected, strict=True)):
                where = f"{name} {title} {i}"
                if isinstance(a, Tensor):
                    found[where] = relative(a, b)
                    continue
                found[f"{where} indices"] = float(not torch.equal(a.indices, b.indices))
                found[f"{where} unequal"] = float(unequal(a.log_probs))  # all ranks have the same bits
                found[where] = relative(a.log_probs.exp(), b.log_probs.exp())
                found[f"{where} rest"] = relative(a.log_rest, b.log_rest)
    return found


def mixtures(world: World) -> dict[str, float]:
    """Of lists, which all ranks have whole, and of a bucket with heads in slices; of heads alone they are refused."""
    p, own = problem(N, V=V, bias=True), world.columns()
    lists = {tail: [cached(p, k, tail) for k in (12, 40)] for tail in ("uniform", "renormalize", "bucket")}
    which, weight = torch.arange(N) % 2, torch.rand(N, generator=torch.Generator().manual_seed(3))
    whole, mine = p.teacher(), world.teacher(p)
    cases = {
        "uniform": lambda head: [(0.3, lists["uniform"][0]), (0.7, lists["renormalize"][1])],
        "tokens": lambda head: [(weight, lists["renormalize"][0]), (1 - weight, lists["renormalize"][1])],
        "which": lambda head: fk.Mixture(lists["bucket"], which=which),
        "bucket": lambda head: [(0.5, lists["bucket"][1]), (0.5, head)],
    }
    found = {}
    for name, case in cases.items():
        leaves, copies = world.own(*p.leaves), [x.detach().clone().requires_grad_() for x in p.leaves]
        loss = fk.kd_loss(fk.LMHead(*leaves), case(mine), p.labels, ANY, tp_group=world.group).loss
        expected = fk.kd_loss(fk.LMHead(*copies), case(whole), p.labels, ANY, backend="torch").loss
        loss.backward()
        expected.backward()
        found |= {name: relative(loss, expected), f"{name} hidden": relative(leaves[0].grad, copies[0].grad)}
        for leaf, copy in zip(leaves[1:], copies[1:], strict=True):
            found[f"{name} {leaf.dim()}"] = float((leaf.grad - copy.grad[own]).norm() / copy.grad.norm())
    try:
        fk.kd_loss(fk.LMHead(*world.own(*p.leaves)), [(0.5, mine), (0.5, mine)], p.labels, ANY, tp_group=world.group)
        found["refused"] = 1.0
    except ValueError as error:
        found["refused"] = float("must not be a mixture without lists with tp_group" not in str(error))
    return found


_FUNCTIONS = (
    low_precision, kernels, nothing_valid, twice_and_annealed, dtensors, two_dimensions, refusals, resharded, traffic,
    compiled, lists, mixtures,
)  # fmt: skip
OTHERS = {function.__name__: function for function in _FUNCTIONS}


def work(rank: int, size: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(rank, size)
    cases = {name: (lambda case=case: run_case(world, *case)) for name, case in matrix().items()}
    cases |= {name: (lambda function=function: function(world)) for name, function in OTHERS.items()}
    found: dict[str, Any] = {}
    for name, case in cases.items():
        values = case()
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, values)
        keys = sorted({key for each in everyone for key in each})
        found[name] = {key: worst(each.get(key, 0.0) for each in everyone) for key in keys}
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def main(out: Path, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(work, (size, f"{folder}/store", out), nprocs=size, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
