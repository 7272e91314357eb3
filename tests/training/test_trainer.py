"""KDTrainer against a plain full-logits step, under accumulation, on resuming, and with bad input."""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.integrations.distributed import check_engine, hard_threshold
from fused_kd.integrations.forms import is_given
from fused_kd.integrations.sampling import LengthGroupedEpochs, MaskedTail, PaddedSampler, ShuffledEpochs
from fused_kd.training.collate import Collator
from fused_kd.training.specs import parse_objective
from fused_kd.training.trainer import BetaSchedule, KDTrainer
from tests.training.tiny import VOCAB, rows, tiny


def trainer(
    folder: Path, student: Any, objective: Any, data: list, *, teacher: Any = None, **options: Any
) -> KDTrainer:
    """KDTrainer's own options, ``eval_data``, ``collator``, and those of TrainingArguments."""
    names = ("beta_schedule", "vocab_size", "temperature", "compute_metrics", "average", "statistics")
    own = {name: options.pop(name) for name in names if name in options}
    evaluated, collator = options.pop("eval_data", None), options.pop("collator", Collator(0))
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 2, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True, "seed": 0, **options,
    }  # fmt: skip
    made = KDTrainer(
        student, teacher, objective, args=transformers.TrainingArguments(**arguments), train_dataset=data,
        eval_dataset=evaluated, data_collator=collator, **own,
    )  # fmt: skip
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


def kd(folder: Path, objective: Any, data: list, **options: Any) -> KDTrainer:
    """`trainer` of the usual student and teacher."""
    return trainer(folder, tiny(16, seed=1), objective, data, **{"teacher": tiny(24, seed=2), **options})


def logged(run: KDTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


SGD = {"optim": "sgd", "learning_rate": 0.5, "train_sampling_strategy": "sequential"}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_weights(left: dict, right: dict, tolerance: float) -> None:
    for name, value in left.items():
        error = (value - right[name]).norm() / right[name].norm()
        assert error <= tolerance, f"{name}: relative difference {error:.2e}"


def full_logits_loss(objective: fk.objectives.Objective, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor):
    """Self-Evolution, ForwardKD and SFT written out on logits (N, V): sum over tokens, difficulties."""
    lq = z.log_softmax(-1)
    ce = torch.nn.functional.nll_loss(lq, y, reduction="none")
    if isinstance(objective, fk.SFT):
        return ce.sum(), ce.detach()
    p = t.softmax(-1)
    onehot = torch.nn.functional.one_hot(y, z.shape[-1]).to(p)
    mixed = (1 - objective.lam) * onehot + objective.lam * p
    difficulty = (torch.xlogy(mixed, mixed) - mixed * lq).sum(-1)
    if isinstance(objective, fk.ForwardKD):
        kl = (torch.xlogy(p, p) - p * lq).sum(-1)
        return ((1 - objective.lam) * ce + objective.lam * kl).sum(), difficulty.detach()
    between = objective.beta * lq.exp() + (1 - objective.beta) * mixed
    skewed = (torch.xlogy(mixed, mixed) - mixed * between.log()).sum(-1)
    return torch.where(difficulty > objective.gamma, skewed, difficulty).sum(), difficulty.detach()


def plain_training(student, teacher, objective, batches: list[list], learning_rate: float) -> list[dict]:
    """SGD on whole batches with both models' logits: what KDTrainer must reproduce."""
    optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate)
    logged = []
    for batch in batches:
        inputs = Collator(0)(batch)
        labels = inputs.pop("labels")[:, 1:]
        valid = labels != -100
        with torch.no_grad():
            t = teacher(**inputs).logits[:, :-1][valid]
        z = student(**inputs).logits[:, :-1][valid]
        total, difficulty = full_logits_loss(objective, z, t, labels[valid])
        loss = total / valid.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gamma = getattr(objective, "gamma", 0.4)
        logged.append(
            {
                "loss": loss.item(),
                "difficulty": difficulty.mean().item(),
                "hard_fraction": (difficulty > gamma).float().mean().item(),
            }
        )
    return logged


@pytest.mark.parametrize(
    "objective", [fk.SFT(), fk.ForwardKD(lam=0.7), fk.SelfEvolution(gamma=2.0)], ids=lambda o: o.name
)
def test_same_as_full_logits(tmp_path: Path, objective: fk.objectives.Objective) -> None:
    data = rows(16)
    teacher = tiny(24, seed=2).train()
    before = weights(teacher)
    plain = tiny(16, seed=1)
    batches = [data[4 * i : 4 * i + 4] for i in range(4)]
    expected = plain_training(plain, teacher, objective, batches, learning_rate=0.5)
    student = tiny(16, seed=1)
    start = weights(student)
    options = {**SGD, "max_steps": 4, "max_grad_norm": 0.0, "logging_steps": 1}
    run = trainer(tmp_path, student, objective, data, teacher=teacher, **options)
    run.train()
    assert_same_weights(weights(student), weights(plain), 1e-5)
    assert any((start[name] - value).norm() > 1e-3 for name, value in weights(plain).items())
    for ours, theirs in zip(logged(run), expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    if isinstance(objective, fk.SelfEvolution):
        assert 0.05 < expected[0]["hard_fraction"] < 0.95, "both branches must be taken"
    if objective.spec.needs_teacher:
        assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert_same_weights(weights(teacher), before, 0.0)


@pytest.mark.parametrize(
    "objective", [fk.SelfEvolution(gamma=2.0), fk.SelfEvolutionTopK(fraction=0.3)], ids=lambda o: o.name
)
def test_gradient_accumulation_is_exact(tmp_path: Path, objective: fk.objectives.Objective) -> None:
    """Also of the tokens that are ranked over the whole step."""
    data = rows(24)
    counts = {sum(label != -100 for label in row["labels"][1:]) for row in data}
    assert len(counts) > 3, "rows must differ in tokens, or a wrong denominator would not show"
    trained = []
    for batch, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "logging_steps": 1}
        run = kd(tmp_path, objective, data, max_steps=3, **SGD, **options)
        run.train()
        trained.append((weights(run.model), logged(run)))
    assert_same_weights(trained[0][0], trained[1][0], 1e-5)
    for whole, parts in zip(trained[0][1], trained[1][1], strict=True):
        for key in ("loss", "difficulty", "hard_fraction"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4)


def test_ranked_tokens_are_the_trained_ones_under_dropout(tmp_path: Path) -> None:
    student, data = tiny(16, seed=1, attention_dropout=0.5), rows(8)
    options = {"teacher": tiny(24, seed=2), "gradient_accumulation_steps": 2, "max_steps": 1}
    run = trainer(tmp_path, student, fk.SelfEvolutionTopK(fraction=0.3), data, **options)
    hard, passes = [], run._run

    def spy(model, inputs, objective, *rest):
        loss, out = passes(model, inputs, objective, *rest)
        if isinstance(objective, fk.SelfEvolution):
            hard.append(int(out.is_hard.sum()))
        return loss, out

    run._run = spy
    run.train()
    count = sum(label != -100 for row in data for label in row["labels"][1:])
    assert len(hard) == 2 and sum(hard) == math.ceil(0.3 * count)


def test_hard_threshold() -> None:
    one = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    values = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float() / 7
    for fraction in (0.02, 0.1, 0.31, 0.5, 0.98):
        gamma = hard_threshold(one, [values[:20], values[20:20], values[20:]], fraction)
        assert (values > gamma).sum() == math.ceil(fraction * 50), fraction
    assert hard_threshold(one, [values], 0.0) == math.inf
    assert hard_threshold(one, [values], 1.0) == 0.0
    assert hard_threshold(one, [values[:0]], 0.5) == math.inf
    assert hard_threshold(one, [torch.tensor([1.0, 1.0, 1.0, 0.0])], 0.5) == 1.0, "ties at the limit are easy"


def test_orders_and_padding() -> None:
    lengths = [3 + index % 7 for index in range(13)]
    for sampler in (ShuffledEpochs(13, seed=5), LengthGroupedEpochs(lengths, 4, seed=5)):
        padded = PaddedSampler(sampler, 8)
        first = list(padded)
        assert len(padded) == len(first) == 16
        assert sorted(first[:13]) == list(range(13)) and first[13:] == [13 + first[12]] * 3
        assert list(padded) == first
        padded.set_epoch(1)
        assert list(padded) != first and sorted(list(padded)[:13]) == list(range(13))
    assert len(PaddedSampler(ShuffledEpochs(16, seed=5), 8)) == 16
    lists = torch.zeros(2, 4)
    data = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "teacher_log_probs": lists, "teacher_indices": lists}]
    tail = MaskedTail(data)
    assert len(tail) == 1 and tail[0] is data[0]
    assert tail[1]["labels"] == [-100] * 3 and tail[1]["input_ids"] == [1, 2, 3]
    assert tail[1]["teacher_indices"].shape == (0, 4) and data[0]["labels"] == [-100, 2, 3]
    assert (Collator(0)([tail[1]])["labels"] == -100).all()


def test_what_engines_cannot_do() -> None:
    def check(model: object = None, sized: bool = True, strategy: str = "random", **options: object) -> None:
        state = SimpleNamespace(fsdp_plugin=options.pop("fsdp", None))
        config = SimpleNamespace(split_batches=options.pop("split", False), dispatch_batches=None)
        accelerator = SimpleNamespace(state=state, num_processes=2, **options)
        check_engine(
            accelerator, SimpleNamespace(accelerator_config=config, train_sampling_strategy=strategy), model, sized
        )

    check()
    check(fsdp=SimpleNamespace(fsdp_version=2))
    for message, wrong in (
        ("fsdp_version must be 2, got 1", {"fsdp": SimpleNamespace(fsdp_version=1)}),
        ("tp_size must be 1, got 2", {"parallelism_config": SimpleNamespace(tp_size=2)}),
        ("split_batches must be False", {"split": True}),
        ("train_dataset must have a length", {"sized": False}),
        ("got 'batch_rebalance'", {"strategy": "batch_rebalance"}),
        ("must not be sharded while", {"model": SimpleNamespace(is_distributed_loading_by_transformers=True)}),
    ):
        with pytest.raises(ValueError, match=message):
            check(**wrong)


def test_cached_teacher(tmp_path: Path) -> None:
    class Cache:
        tail = "uniform"

    data, teacher = rows(16), tiny(24, seed=2)
    assert is_given(Cache()) and not is_given(teacher) and not is_given(None)
    for row in data:  # every entry: the cache is the teacher
        targets = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][targets]
        row["teacher_log_probs"], row["teacher_indices"] = logits.log_softmax(-1).topk(VOCAB)
    trained = []
    for given in (Cache(), teacher):
        run = kd(tmp_path, fk.ReverseKD(), data, teacher=given, eval_data=data, optim="sgd", max_steps=3)
        run.train()
        trained.append((weights(run.model), run.evaluate()["eval_loss"]))
    assert_same_weights(trained[0][0], trained[1][0], 1e-5)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-5)
    kd(tmp_path, fk.SFT(), data, teacher=Cache(), max_steps=1).train()
    message = "batch must have teacher_log_probs and teacher_indices for the cached teacher"
    with pytest.raises(ValueError, match=message):
        kd(tmp_path, fk.NoEvo(), rows(4), teacher=Cache()).train()


def test_cached_lists_keep_their_digits_under_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, tiny(16, seed=1), fk.SFT(), rows(4))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(run, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(run.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    batch = {"labels": torch.ones(1, 2), "pixels": torch.ones(1), "teacher_log_probs": torch.ones(1, 2, 3)}
    prepared = run._prepare_inputs(batch)
    assert prepared["pixels"].dtype == torch.bfloat16 and prepared["teacher_log_probs"].dtype == torch.float32


def test_compiled_body(tmp_path: Path) -> None:
    trained = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        run = kd(tmp_path, fk.NoEvo(), rows(4), max_steps=1, **arguments)
        run.train()
        trained.append(weights(run.model))
    assert_same_weights(trained[0], trained[1], 1e-6)


@pytest.mark.parametrize(
    "stop,options",
    [
        (7, {"train_sampling_strategy": "group_by_length"}),
        (7, {"restore_callback_states_from_checkpoint": True, "statistics": ("entropy_s", "kl")}),
        (6, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    ],
    ids=["grouped-second-epoch", "callbacks-restored", "accumulated"],
)
def test_resume_gives_the_same_result(tmp_path: Path, stop: int, options: dict) -> None:
    data = rows(20)  # 5 steps an epoch
    shared = {"max_steps": 10, "logging_steps": 4, "save_strategy": "steps", "save_steps": stop, **options}

    def make(folder: str) -> KDTrainer:
        schedule = BetaSchedule(fraction=0.8)
        return kd(tmp_path / folder, fk.SelfEvolution(gamma=2.0), data, beta_schedule=schedule, **shared)

    whole = make("whole")
    whole.train()

    class Kill(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == stop:
                raise KeyboardInterrupt

    killed = make("parts")
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.manual_seed(12345)  # another process would start elsewhere
    resumed = make("parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(whole.model), 0.0)
    ours, theirs = ([{**entry, **TIMED} for entry in logged(run)] for run in (resumed, whole))
    assert len(theirs) == 2 and "beta" in theirs[0] and ours == theirs
    assert {*options.get("statistics", ())} <= theirs[1].keys()
    assert resumed.metrics.total_seconds > 0


TIMED = {"tokens_per_second": 0, "peak_memory_mb": 0}


def test_logs(tmp_path: Path) -> None:
    run = kd(tmp_path, fk.SelfEvolution(), rows(16), eval_data=rows(6, seed=9), eval_strategy="steps", eval_steps=2)
    run.train()
    assert [entry["step"] for entry in logged(run)] == [2, 4, 6]
    for entry in logged(run):
        assert 0 <= entry["hard_fraction"] <= 1 and entry["difficulty"] > 0
        assert entry["tokens_per_second"] > 0 and entry["peak_memory_mb"] > 10
        assert "beta" not in entry
    evaluated = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3 and all(entry["eval_loss"] > 0 for entry in evaluated)


def test_evaluation_is_the_mean_loss_without_logits(tmp_path: Path) -> None:
    """Of the tokens, however they are batched."""
    student, teacher, data = tiny(16, seed=1), tiny(24, seed=2), rows(5, seed=9)
    objective, options = fk.SelfEvolution(gamma=2.0), {"per_device_eval_batch_size": 2, "max_steps": 1}
    run = trainer(tmp_path, student, objective, rows(8), teacher=teacher, eval_data=data, **options)
    expected = plain_training(tiny(16, seed=1), teacher, objective, [data], learning_rate=0.0)[0]["loss"]

    def refuse(module: object, inputs: object, output: object) -> None:
        # the head's module is called, for the hooks of DDP, FSDP2 and ZeRO-3, but it computes the loss
        assert isinstance(output, dict) and all(value.dim() == 0 for value in output.values()), "logits were computed"

    for model in (student, teacher):
        model.lm_head.register_forward_hook(refuse)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    run.train()
    batch = Collator(0)(data)
    loss, outputs = run.compute_loss(student, batch, return_outputs=True)
    assert torch.equal(loss, outputs["loss"]) and outputs["difficulty"].shape == batch["labels"].shape


def test_beta_schedule(tmp_path: Path) -> None:
    schedule = BetaSchedule(start=1.0, fraction=0.5)
    assert [schedule.beta(x, end=0.4) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    assert BetaSchedule(start=0.5, end=1.0, fraction=1.0).beta(0.5, end=0.1) == 0.75
    held = BetaSchedule(start=1.0, hold=0.2, fraction=0.8)
    assert [held.beta(x, end=0.5) for x in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([1.0, 1.0, 0.75, 0.5])
    # one step at beta = 1 is a step of NoEvo
    trained, losses = [], []
    for objective, options in ((fk.Skew(), {"beta_schedule": schedule}), (fk.NoEvo(), {}), (fk.Skew(), {})):
        run = kd(tmp_path, objective, rows(8), max_steps=1, optim="sgd", eval_data=rows(4, seed=9), **options)
        losses.append(run.evaluate()["eval_loss"])
        run.train()
        trained.append(weights(run.model))
    assert_same_weights(trained[0], trained[1], 1e-6)
    with pytest.raises(AssertionError):
        assert_same_weights(trained[0], trained[2], 1e-4)
    assert losses[0] == losses[2], "losses of one training must be comparable while beta moves"

    run = kd(tmp_path, fk.SelfEvolution(beta=0.5), rows(16), beta_schedule=BetaSchedule(fraction=2 / 3))
    run.train()
    assert [entry["beta"] for entry in logged(run)] == pytest.approx([0.75, 0.5, 0.5])
    assert run.objective == fk.SelfEvolution(beta=0.5) == run.current_objective()


def test_warns_once_when_all_tokens_stay_hard(tmp_path: Path) -> None:
    """Of those that the teacher finds easy: what it cannot tell either is hard for every student near to it."""
    teacher = tiny(8, seed=2)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(10)
    known = told_by(teacher, rows(16))
    options = {"teacher": teacher, "max_steps": 24, "learning_rate": 0.0, "per_device_train_batch_size": 1}
    with pytest.warns(UserWarning, match=r"hard_fraction was \S+ \(0\.[0-3]\d for the teacher itself\)") as caught:
        run = trainer(tmp_path, tiny(8, seed=1), fk.SelfEvolution(), known, **options)
        run.train()
    assert "stayed so for 20 steps" in str(caught[0].message)
    assert "Take objective='forward_kd' or 'self_evolution:floor=0.3'" in str(caught[0].message)
    assert sum("hard_fraction" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, tiny(8, seed=1), fk.SelfEvolution(gamma=30.0), known, **options).train()
        for unskewed in (fk.GeneralizedJSD(), fk.AlphaBeta(), 0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD()):
            trainer(tmp_path, tiny(8, seed=1), unskewed, known, **options).train()
        good = trainer(tmp_path, copy.deepcopy(teacher).requires_grad_(True), fk.SelfEvolution(), rows(16), **options)
        good.train()
    for entry in logged(good):
        assert entry["hard_fraction"] > 0.8, "the labels are random"
        assert entry["hard_fraction_t"] == pytest.approx(entry["hard_fraction"], abs=0.02)


def told_by(teacher: Any, data: list) -> list:
    """The rows, with the teacher's first tokens as labels."""
    made = []
    for row in data:
        with torch.no_grad():
            first = teacher.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        labels = [new if old != -100 else -100 for old, new in zip(row["labels"], [0, *first], strict=False)]
        made.append({"input_ids": row["input_ids"], "labels": labels})
    return made


def test_padded_vocabularies(tmp_path: Path) -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return VOCAB

    student, teacher = tiny(16, seed=1, vocab=64), tiny(24, seed=2, vocab=72)
    with pytest.raises(ValueError, match="vocabularies of 64 and 72: give vocab_size"):
        trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=teacher)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, 64\].*got 70"):
        trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=teacher, vocab_size=70)
    assert trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=tiny(8, seed=3, vocab=64)).vocab_size is None
    from fused_kd.integrations.transformers import common_vocab_size

    assert common_vocab_size(student, teacher, None, Tokenizer()) == VOCAB
    # columns past vocab_size take no part
    losses = []
    for factor in (1.0, 5.0):
        with torch.no_grad():
            student.lm_head.weight[VOCAB:] *= factor
        run = trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=teacher, vocab_size=VOCAB, eval_data=rows(4))
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "objective,kd,arguments,message",
    [
        ("self_evolution", {"teacher": None}, {}, "teacher must be given for SelfEvolution"),
        ("selfevolution", {}, {}, "objective must be one of sft, forward_kd, .*got 'selfevolution'"),
        ("forward_kd", {"beta_schedule": BetaSchedule()}, {}, "beta_schedule needs an objective with one beta"),
        ("symmetric_kl", {"beta_schedule": BetaSchedule()}, {}, "beta_schedule needs an objective with one beta"),
        (fk.Skew(beta=torch.tensor(0.5)), {"beta_schedule": BetaSchedule()}, {}, "one beta, a number, that is the"),
        (
            "todi",
            {"teacher": SimpleNamespace(tail="renormalize")},
            {},
            "tail must be 'uniform', 'bucket' or 'listed' for ToDi",
        ),
        ("sft+z_loss+no_evo", {"teacher": SimpleNamespace(tail="bucket")}, {}, "tail must be 'uniform' for SFT"),
        ("no_evo", {"teacher": SimpleNamespace(tail="bucket"), "temperature": 2.0}, {}, "temperature must be 1 with"),
        ("no_evo", {"compute_metrics": print}, {}, "compute_metrics must be None"),
        ("no_evo", {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ("no_evo", {"temperature": 0.0}, {}, "temperature"),
    ],
)
def test_bad_arguments(tmp_path: Path, objective: Any, kd: dict, arguments: dict, message: str) -> None:
    options = {"teacher": tiny(8, seed=2), **kd}
    teacher = options.pop("teacher")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny(8, seed=1), objective, rows(4), teacher=teacher, **options, **arguments).train()


def test_more_bad_arguments(tmp_path: Path) -> None:
    student = tiny(8, seed=1)
    with pytest.raises(ValueError, match="another model than the student"):
        trainer(tmp_path, student, fk.NoEvo(), rows(4), teacher=student)
    with pytest.raises(TypeError, match="objective must be a fused_kd objective or its text"):
        trainer(tmp_path, student, 0.5, rows(4))
    for options, message in (
        ({"start": 1.5}, r"start must be in \[0, 1\], got 1.5"),
        ({"fraction": 0}, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": 0.75, "hold": 0.5}, r"hold must be in \[0, 1 - fraction\] = \[0, 0.25\], got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            BetaSchedule(**options)


def test_length_grouped_epochs() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(403)]
    sampler = LengthGroupedEpochs(lengths, 8, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(403)) == sorted(orders[1])
    batches = [[lengths[i] for i in orders[1][start : start + 8]] for start in range(0, 400, 8)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 8, "a random batch spreads about 39"
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest, reverse=True), "batches must come in random order"
    assert list(LengthGroupedEpochs(lengths, 8, seed=6)) != orders[0]


def test_objectives_as_text() -> None:
    spec = parse_objective("self_evolution:gamma=0.3,beta=0.7,beta_warmup=0.25")
    assert repr(spec.objective) == "SelfEvolution(lam=0.5, beta=0.7, gamma=0.3)"
    assert spec.beta_schedule == BetaSchedule(fraction=0.25) and parse_objective("sft").beta_schedule is None
    assert spec.slug == "self_evolution-gamma=0.3-beta=0.7-beta_warmup=0.25"
    for text, message in (
        ("evolution", "objective must be one of sft, forward_kd, .*got 'evolution'"),
        ("forward_kd:beta=0.5", "forward_kd takes lam, got 'beta=0.5'"),
        ("no_evo:lam", "lam must be a number, got ''"),
        ("no_evo:lam=0.1,lam=0.2", "lam must be given once"),
        ("no_evo:lam=half", "lam must be a number, got 'half'"),
        ("skew:beta=1.5", r"beta must be in \[0, 1\], got 1.5"),
        ("skew:beta_warmup=2", r"beta_warmup must be a number in \(0, 1\], got '2'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_objective(text)


def test_sums_as_text_with_a_schedule() -> None:
    spec = parse_objective("0.5*sft + 0.5*self_evolution:beta_warmup=0.2,floor=0.3+1e-4*z_loss")
    assert str(spec.objective) == "0.5*sft+0.5*self_evolution:floor=0.3+0.0001*z_loss"
    assert spec.beta_schedule == BetaSchedule(fraction=0.2)
    assert re.fullmatch(r"[\w.=-]+", spec.slug) and len(parse_objective("+".join(["forward_kd:lam=0.5"] * 9)).slug) < 90
    assert parse_objective("skew:beta_warmup=0.2+generalized_jsd").beta_schedule == BetaSchedule(fraction=0.2)
    for text in ("skew:beta_warmup=0.2+skew_teacher", "generalized_jsd:beta_warmup=0.2", "alpha_beta:beta_warmup=0.2"):
        with pytest.raises(ValueError, match="one beta, a number, that is the student's share of a mixture"):
            parse_objective(text)
    assert parse_objective("1e+4*sft").slug != parse_objective("1e-4*sft").slug == "1e-4-sft"
    with pytest.raises(ValueError, match="beta_warmup must stand with self_evolution, whose beta it moves"):
        parse_objective("self_evolution+generalized_jsd:beta_warmup=0.2")
    with pytest.raises(ValueError, match="beta_warmup must be given once"):
        parse_objective("skew:beta_warmup=0.2,beta_warmup=0.3")


def test_a_schedule_moves_the_gated_part_of_a_sum(tmp_path: Path) -> None:
    objective = 0.5 * fk.SelfEvolution(beta=0.4, gamma=1.0) + 0.5 * fk.GeneralizedJSD(beta=0.3)
    run = trainer(
        tmp_path, tiny(8, seed=1), objective, rows(8), teacher=tiny(16, seed=2),
        beta_schedule=BetaSchedule(fraction=1.0), max_steps=2, logging_steps=1,
    )  # fmt: skip
    run.train()
    assert [entry["beta"] for entry in logged(run)] == pytest.approx([0.7, 0.4])
    now = run.current_objective()
    assert str(now) == "0.5*self_evolution:beta=0.4,gamma=1.0+0.5*generalized_jsd:beta=0.3"


def test_a_ranked_part_of_a_sum_becomes_a_threshold(tmp_path: Path) -> None:
    data, teacher = rows(8), tiny(16, seed=2)
    objective = 0.5 * fk.SelfEvolutionTopK(fraction=0.3, floor=0.2) + 0.5 * fk.SFT()
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student = tiny(8, seed=1)
        options = {**SGD, "max_steps": 2, "max_grad_norm": 0.0}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer(tmp_path / str(batch), student, objective, data, teacher=teacher, **options).train()
        found.append(weights(student))
    assert_same_weights(found[0], found[1], 1e-5)


def test_statistics_are_logged(tmp_path: Path) -> None:
    data, teacher = rows(8), tiny(16, seed=2)
    names = ("entropy_t", "kl", "overlap")
    logs = []
    for accumulation in (1, 2):
        run = trainer(
            tmp_path / str(accumulation), tiny(8, seed=1), fk.ForwardKD(lam=1), data, teacher=teacher, statistics=names,
            max_steps=1, logging_steps=1, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run.train()
        logs.append(logged(run)[0])
    assert logs[0]["kl"] == pytest.approx(logs[0]["loss"], rel=1e-5)
    assert 0 < logs[0]["overlap"] < 1 and 0 < logs[0]["entropy_t"] < math.log(VOCAB)
    for name in names:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    with pytest.raises(TypeError, match=r"statistics must be a sequence of names such as \('kl',\), got 'kl'"):
        trainer(tmp_path, tiny(8, seed=1), fk.NoEvo(), data, teacher=teacher, statistics="kl")
    with pytest.raises(ValueError, match=r"statistics must be among .* got 'entropy'"):
        trainer(tmp_path, tiny(8, seed=1), fk.NoEvo(), data, teacher=teacher, statistics=["entropy"])
    with pytest.raises(ValueError, match="without a teacher, got 'kl'"):
        trainer(tmp_path, tiny(8, seed=1), fk.SFT(), data, statistics=["kl"])
    with pytest.raises(ValueError, match="statistics need a teacher that is no list of entries, got kl with a cache"):
        trainer(tmp_path, tiny(8, seed=1), fk.NoEvo(), data, teacher=SimpleNamespace(tail="bucket"), statistics=["kl"])


def test_statistics_that_a_checkpoint_does_not_have_start_with_it(tmp_path: Path) -> None:
    options = {"teacher": tiny(16, seed=2), "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    options |= {"restore_callback_states_from_checkpoint": True}
    trainer(tmp_path, tiny(8, seed=1), fk.NoEvo(), rows(8), statistics=["kl"], max_steps=1, **options).train()
    run = trainer(tmp_path, tiny(8, seed=1), fk.NoEvo(), rows(8), statistics=["entropy_t"], max_steps=2, **options)
    run.train(resume_from_checkpoint=True)
    assert logged(run)[-1]["entropy_t"] > 0 and "kl" not in logged(run)[-1]
