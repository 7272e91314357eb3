"""TRL's trainers with a fused loss: TRL's own divergence in float64, and runs beside TRL's own trainers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that GKD is experimental
    from trl.experimental import gkd
import datasets
import tokenizers
import transformers
import trl
from trl.trainer.distillation_trainer import _chunked_divergence_loss

import fused_kd as fk
from fused_kd.integrations import trl as ours
from fused_kd.reference import reference_kd_loss
from fused_kd.training.checkpoints import WholeCheckpoints
from tests.training.distributed_worker import ZERO3, shard_on_cpu, whole
from tests.training.tiny import tiny

# relative: the loss and gradients in fp32, in float64, and of whole runs
FP32, FP64, RUN = 1e-5, 1e-12, 1e-4
BETAS = [0.0, 0.1, 0.5, 1.0]
WORDS = 40
SPECIAL = ["<pad>", "<s>", "</s>", "user", "assistant"]
VOCAB = len(SPECIAL) + WORDS
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert float(expected.norm()) > 0
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def batch(dtype: torch.dtype, V: int = 61) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (3, 7, V) of both models, and unshifted labels with prompts of unequal length and a padded tail."""
    z_s = torch.randn(3, 7, V, dtype=torch.float64) * 2
    z_t = z_s + torch.randn(3, 7, V, dtype=torch.float64)
    labels = torch.randint(V, (3, 7))
    for row, prompt in enumerate((1, 3, 6)):
        labels[row, :prompt] = -100
    labels[1, 5:] = -100
    return z_s.to(dtype), z_t.to(dtype), labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", 23])
def test_divergence_is_that_of_gkd(beta: float, temperature: float, reduction: str | int) -> None:
    """Loss and gradient of the student's logits, with TRL's mask and each of its denominators."""
    z_s, z_t, labels = batch(torch.float64)
    theirs = z_s.clone().requires_grad_()
    normalised = {"num_items_in_batch": reduction} if isinstance(reduction, int) else {"reduction": reduction}
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        theirs[:, :-1], z_t[:, :-1], labels[:, 1:], beta=beta, temperature=temperature, **normalised
    )
    (dz,) = torch.autograd.grad(expected, theirs)
    options: dict[str, Any] = {"shift": True, "temperature": temperature}
    if reduction == "sum":
        options["reduction"] = "sum"
    num_items = reduction if isinstance(reduction, int) else None
    for loss_of, dtype, limit in ((reference_kd_loss, torch.float64, FP64), (fk.kd_loss, torch.float32, FP32)):
        mine = z_s.to(dtype).requires_grad_()
        found = loss_of(mine, z_t.to(dtype), labels, fk.GeneralizedJSD(beta=beta), num_items=num_items, **options).loss
        assert relative(found.detach(), expected.detach()) < limit
        assert relative(torch.autograd.grad(found, mine)[0], dz) < limit


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_that_of_distillation(beta: float, temperature: float) -> None:
    """TRL's chunked divergence of hidden states, whose logits it makes in fp32; gradients of both student's tensors."""
    h_s, W_s, h_t, W_t = torch.randn(3, 6, 8), torch.randn(61, 8), torch.randn(3, 6, 12), torch.randn(61, 12)
    mask = (torch.rand(3, 6) < 0.6).long()
    mask[0, 0] = 1
    sides = [[x.clone().requires_grad_() for x in (h_s, W_s)] for _ in range(2)]
    expected = _chunked_divergence_loss(
        sides[0][0], h_t, sides[0][1], W_t, mask, beta, student_logit_scale=0.5, temperature=temperature
    )[0]
    labels = torch.randint(61, (3, 6)).masked_fill(mask == 0, -100)
    student = fk.LMHead(*sides[1], logit_scale=0.5)
    found = fk.KDLoss(fk.GeneralizedJSD(beta=beta), temperature=temperature)(student, fk.LMHead(h_t, W_t), labels)
    assert relative(found.detach(), expected.detach()) < FP32
    gradients = [torch.autograd.grad(loss, side) for loss, side in ((found, sides[1]), (expected, sides[0]))]
    for mine, theirs in zip(*gradients, strict=True):
        assert relative(mine, theirs) < FP32


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def dialogues(count: int = 12) -> datasets.Dataset:
    rng = random.Random(3)

    def said(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(low, high)))

    rows = [
        {"messages": [{"role": "user", "content": said(1, 4)}, {"role": "assistant", "content": said(1, 6)}]}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def prompts(count: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": row["messages"][:1]} for row in dialogues(count)])


COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "seed": 5,
}


def arguments(kind: type, folder: Path, **options: Any) -> Any:
    return kind(**{"output_dir": str(folder), **COMMON, **options})


def pair(vocab: tuple[int, int] = (VOCAB, VOCAB)) -> list[transformers.PreTrainedModel]:
    """Student and teacher, with the tokenizer's end of text."""
    made = [tiny(hidden, seed, vocab=rows) for hidden, seed, rows in ((16, 1, vocab[0]), (24, 2, vocab[1]))]
    for model in made:
        model.generation_config.eos_token_id = 2
    return made


def train(cls: Any, args: Any, data: Any, models: Any = None, **extra: Any) -> Any:
    """The trainer after its run; ``seen`` are the batches of its losses, ``written`` who generated what."""
    student, teacher = models or pair()
    extra.setdefault("processing_class", tokenizer())
    seen: list[dict[str, torch.Tensor]] = []
    written: list[tuple[str, torch.Tensor]] = []

    class Watched(cls):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            seen.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
            return super().compute_loss(model, inputs, *rest, **options)

    trainer = Watched(student, teacher, args, train_dataset=data, **extra)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    for name, model in (
        ("student", trainer.model),
        ("teacher", trainer.accelerator.unwrap_model(trainer.teacher_model)),
    ):

        def generate(*args: Any, name: str = name, original: Any = model.generate, **options: Any) -> Any:
            out = original(*args, **options)
            written.append((name, getattr(out, "sequences", out).clone()))
            return out

        model.generate = generate
    trainer.start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    random.seed(11)  # GKD draws from it whether a batch is on-policy
    torch.manual_seed(11)
    trainer.train()
    trainer.seen, trainer.written = seen, written
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def assert_same_run(mine: Any, theirs: Any) -> None:
    assert len(losses(mine)) == 3
    assert losses(mine) == pytest.approx(losses(theirs), rel=RUN)
    assert_same_weights(dict(mine.model.named_parameters()), theirs)


@torch.no_grad()
def assert_same_weights(found: dict[str, torch.Tensor], theirs: Any) -> None:
    """What the training changed, parameter by parameter."""
    moved = 0
    for name, expected in theirs.model.named_parameters():
        change = float((expected - theirs.start[name]).norm())
        rounding = 1e-6 * float(expected.norm())
        assert float((found[name] - expected).norm()) <= RUN * change + rounding, name
        moved += change > 100 * rounding
    assert moved >= 3


@torch.no_grad()
def divergence(
    models: list[transformers.PreTrainedModel], batches: list[dict[str, torch.Tensor]], **options: Any
) -> tuple[float, int]:
    """TRL's own, summed over the tokens of GKD batches, from both models' logits; and how many tokens."""
    total, count = 0.0, 0
    for inputs in batches:
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        student, teacher = (model(**given).logits[:, :-1].double() for model in models)
        labels = inputs["labels"][:, 1:]
        total += float(gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, reduction="sum", **options))
        count += int((labels != -100).sum())
    return total, count


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def on_data(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Runs of this trainer and of TRL's on the completions of the data."""
    folder = tmp_path_factory.mktemp("data")
    args = [arguments(gkd.GKDConfig, folder, lmbda=0.0, beta=0.5, temperature=0.7) for _ in range(2)]
    data = {"data": dialogues(), "eval_dataset": dialogues(5)}
    return [train(cls, each, **data) for cls, each in zip((ours.GKDTrainer, gkd.GKDTrainer), args, strict=True)]


def test_gkd_on_data(on_data: list[Any]) -> None:
    """The same losses and weights; TRL's ``temperature`` is for sampling alone."""
    assert_same_run(*on_data)
    assert not on_data[0].written
    evaluated = [run.evaluate()["eval_loss"] for run in on_data]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=RUN)
    assert all(entry["difficulty"] > 0 for entry in on_data[0].state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    "lmbda, beta, seq_kd, adapter",
    [(0.5, 0.1, False, False), (1.0, 1.0, False, False), (0.0, 0.0, False, True), (0.0, 0.5, True, False)],
)
def test_gkd_run(tmp_path: Path, lmbda: float, beta: float, seq_kd: bool, adapter: bool) -> None:
    """The same completions too where the student or the teacher writes, and adapters."""
    runs = []
    for cls in (ours.GKDTrainer, gkd.GKDTrainer):
        sampled = {"lmbda": lmbda, "seq_kd": seq_kd, "temperature": 0.7, "max_new_tokens": 5}
        args = arguments(gkd.GKDConfig, tmp_path, beta=beta, **sampled)
        runs.append(train(cls, args, dialogues(), **({"peft_config": lora()} if adapter else {})))
    assert_same_run(*runs)
    authors = ["teacher"] * 6 if seq_kd else ["student"] * {0.0: 0, 0.5: 2, 1.0: 6}[lmbda]
    assert [name for name, _ in runs[0].written] == authors


def test_distillation_run(tmp_path: Path) -> None:
    """TRL's ``temperature`` is that of the samples and of the divergence."""
    runs = []
    for cls in (ours.DistillationTrainer, trl.DistillationTrainer):
        args = arguments(trl.DistillationConfig, tmp_path, beta=0.5, temperature=1.7, max_completion_length=5)
        runs.append(train(cls, args, prompts()))
    assert_same_run(*runs)
    assert {name for name, _ in runs[0].written} == {"student"}


def test_kernels_of_liger_leave_the_loss_alone(tmp_path: Path) -> None:
    """Its fused cross entropy replaces the model's forward when training starts; the others need a GPU."""
    pytest.importorskip("liger_kernel")
    names = ("rope", "rms_norm", "swiglu", "cross_entropy")
    kernels = {**dict.fromkeys(names, False), "fused_linear_cross_entropy": True}
    args = arguments(
        trl.DistillationConfig, tmp_path, max_completion_length=4, max_steps=1, beta=0.5,
        use_liger_kernel=True, liger_kernel_config=kernels,
    )  # fmt: skip
    run = train(ours.DistillationTrainer, args, prompts())
    total, count = divergence(pair(), [of_distillation(inputs) for inputs in run.seen])
    assert losses(run) == pytest.approx([total / count], rel=FP32)


def test_defaults_of_trl(tmp_path: Path, on_data: list[Any]) -> None:
    """bf16 autocast and gradient checkpointing."""
    args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.0, bf16=True, gradient_checkpointing=True)
    assert losses(train(ours.GKDTrainer, args, dialogues())) == pytest.approx(losses(on_data[0]), rel=1e-2)


def test_whole_checkpoints(tmp_path: Path) -> None:
    """Its newest checkpoint torn, a run goes on from the one before to the same weights."""

    class Resumable(WholeCheckpoints, ours.GKDTrainer):
        pass

    def run() -> Any:
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "gradient_accumulation_steps": 1}
        args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.0, **options)
        return Resumable(*pair(), args=args, train_dataset=dialogues(), processing_class=tokenizer())

    whole_run = run()
    whole_run.train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    again = run()
    with pytest.warns(UserWarning, match="checkpoint-2 lacks optimizer.pt: passed over"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    for mine, theirs in zip(again.model.parameters(), whole_run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_another_objective(tmp_path: Path) -> None:
    args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.0, max_steps=1, gradient_accumulation_steps=1)
    objective = fk.SelfEvolution(gamma=1.7, beta=0.3, lam=0.6)
    trainer = train(ours.GKDTrainer, args, dialogues(), objective=objective, temperature=1.5)
    (inputs,) = trainer.seen
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    student, teacher = (model(**given).logits.detach() for model in pair())
    expected = reference_kd_loss(student, teacher, inputs["labels"], objective, shift=True, temperature=1.5)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    assert entry["loss"] == pytest.approx(float(expected.loss), rel=FP32)
    assert entry["difficulty"] == pytest.approx(float(expected.difficulty.sum()) / tokens, rel=FP32)
    assert entry["hard_fraction"] == pytest.approx(int(expected.is_hard.sum()) / tokens)
    assert 0 < entry["hard_fraction"] < 1


def test_sums_by_their_text(tmp_path: Path) -> None:
    options = {"lmbda": 0.0, "max_steps": 1}
    runs = [
        train(ours.GKDTrainer, arguments(gkd.GKDConfig, tmp_path, **options), dialogues(), objective=objective)
        for objective in ("0.5*sft+0.5*generalized_jsd:beta=0.3", 0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD(beta=0.3))
    ]
    assert losses(runs[0]) == losses(runs[1]) and runs[0].objective == runs[1].objective


def test_unequal_padding_of_one_vocabulary(tmp_path: Path) -> None:
    """Heads of 64 and 72 columns are those of the tokenizer's 45: the same loss as of TRL on cut models."""
    padded, whole = pair((64, 72)), pair()
    for small, large in zip(whole, padded, strict=True):
        state = large.state_dict()
        small.load_state_dict({name: state[name][: len(own)] for name, own in small.state_dict().items()})
    args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.0, max_steps=1)
    mine = train(ours.GKDTrainer, args, dialogues(), padded)
    assert mine.vocab_size == VOCAB and padded[1].config.vocab_size == 72
    total, count = divergence(whole, mine.seen)
    assert losses(mine) == pytest.approx([total / count], rel=FP32)


@pytest.mark.parametrize("cls", [ours.GKDTrainer, ours.DistillationTrainer])
def test_samples_stay_in_the_vocabulary(tmp_path: Path, cls: Any) -> None:
    """A padded column has a random student's probability, yet no teacher's embedding and no place in the loss."""
    gkd_run = cls is ours.GKDTrainer
    options = {"lmbda": 1.0, "max_new_tokens": 8} if gkd_run else {"max_completion_length": 8}
    args = arguments(gkd.GKDConfig if gkd_run else trl.DistillationConfig, tmp_path, max_steps=1, **options)
    trainer = train(cls, args, dialogues() if gkd_run else prompts(), pair((90, 64)))
    assert all(int(tokens.max()) < VOCAB for _, tokens in trainer.written)
    assert losses(trainer)[0] > 0


def test_models_by_name_and_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL loads what it is given by name; examples/trl_gkd.py trains the same from files."""
    names = [str(tmp_path / name) for name in ("student", "teacher")]
    for model, name in zip(pair(), names, strict=True):
        model.save_pretrained(name)
        tokenizer().save_pretrained(name)
    dialogues().to_json(tmp_path / "chats.jsonl")
    # all rows at once, whatever their order
    fields = {**COMMON, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    args = arguments(gkd.GKDConfig, tmp_path / "run", lmbda=0.0, **fields)
    by_name = train(ours.GKDTrainer, args, dialogues(), names)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    path = Path(__file__).parents[2] / "examples" / "trl_gkd.py"
    spec = importlib.util.spec_from_file_location("trl_gkd", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    given = [f"{key}={value}" for key, value in fields.items()]
    files = ["--data", str(tmp_path / "chats.jsonl"), "--output", str(tmp_path / "out")]
    made = example.main(["--student", names[0], "--teacher", names[1], *files, "--lmbda", "0", "--set", *given])
    assert losses(made) == pytest.approx(losses(by_name), rel=1e-6)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(saved.lm_head.weight.detach(), by_name.model.lm_head.weight.detach()) < 1e-6


@pytest.mark.parametrize("name", ["GKDTrainer", "DistillationTrainer"])
def test_teachers_of_another_tokenizer(tmp_path: Path, name: str) -> None:
    """Of the same size: found by the files beside the teacher, given as a model or by name."""
    student, teacher = pair()
    teacher.save_pretrained(tmp_path / "teacher")
    words = [*SPECIAL, *(f"v{i}" for i in range(WORDS))]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    tokenizer().save_pretrained(tmp_path / "student")
    gkd_run = name == "GKDTrainer"
    args = arguments(gkd.GKDConfig if gkd_run else trl.DistillationConfig, tmp_path / "run")
    data = {"train_dataset": dialogues() if gkd_run else prompts(), "processing_class": tokenizer()}
    paths = [str(tmp_path / each) for each in ("student", "teacher")]
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in paths]
    for models in (loaded, paths):
        with pytest.raises(ValueError, match=r"must be one, \d+ of \d+ ids are other tokens .*fused_kd\.vocab_map"):
            getattr(ours, name)(*models, args, **data)
    loaded[1].config._name_or_path = paths[0]
    assert getattr(ours, name)(*loaded, args, **data)


class Scaled(transformers.LlamaForCausalLM):
    """Multiplies its logits by what no field of its configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "objective must be one of .* got 'jsd'", {"objective": "jsd"}),
        (TypeError, "teacher_model must be a model or its name, got 'cache:x'", {"teacher_model": "cache:x"}),
        (ValueError, "temperature must be", {"temperature": 0.0}),
        (ValueError, "vocab_size must be", {"vocab_size": 0}),
        (ValueError, "vocab_size must be in", {"vocab_size": 100}),
        (ValueError, "compute_metrics must be None", {"compute_metrics": print}),
        (ValueError, "^model must be a model", {"model": None}),
        (ValueError, "teacher_model must be a model", {"teacher_model": None}),
        (ValueError, "another model than the student", {"teacher_model": "student"}),
        (ValueError, "must not rank tokens", {"objective": fk.SelfEvolutionTopK()}),
        (ValueError, "does more to its logits", {"teacher_model": "scaled"}),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_errors(tmp_path: Path, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    student, teacher = pair()
    models = {"student": student, "scaled": Scaled(teacher.config)}
    given = {"model": student, "teacher_model": teacher, **options}
    if isinstance(given["teacher_model"], str):
        given["teacher_model"] = models.get(given["teacher_model"], given["teacher_model"])
    args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.0)
    with pytest.raises(error, match=message):
        ours.GKDTrainer(args=args, train_dataset=dialogues(), processing_class=tokenizer(), **given)


def test_on_policy_labels_are_the_students(tmp_path: Path) -> None:
    args = arguments(gkd.GKDConfig, tmp_path, lmbda=0.5)
    with pytest.warns(UserWarning, match="own samples"):
        ours.GKDTrainer(
            *pair(), args, train_dataset=dialogues(), processing_class=tokenizer(), objective=fk.SelfEvolution()
        )


def test_missing_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, ours.__name__)
    with pytest.raises(ImportError, match=r"pip install 'fused_kd\[trl\]'"):
        importlib.import_module(ours.__name__)


ZERO3_RUNS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "data": (ours.GKDTrainer, dialogues, gkd.GKDConfig, {"lmbda": 0.0}),
    "distillation": (
        ours.DistillationTrainer, prompts, trl.DistillationConfig, {"max_completion_length": 4, "max_steps": 1},
    ),
}  # fmt: skip


def zero3_rank(folder: Path, rank: int, port: int) -> None:
    """One of two processes: trains each run and leaves its losses, weights and batches."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shard_on_cpu("zero3")
    for name, (cls, data, kind, options) in ZERO3_RUNS.items():
        engine = {"deepspeed": {**ZERO3, "zero_optimization": dict(ZERO3["zero_optimization"])}, "use_cpu": False}
        args = arguments(kind, folder, per_device_train_batch_size=1, beta=0.5, **engine, **options)
        trainer = train(cls, args, data())
        held = sum(each.numel() for each in trainer.teacher_model.parameters())
        weights = whole(trainer.model, "zero3")
        torch.save((losses(trainer), weights, trainer.seen, held), folder / f"{name}.{rank}.pt")


def main(folder: Path) -> None:
    """Imports once, then forks the two processes; one that dies takes the other with it."""
    importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")  # the engine's, and with it torch's compiler
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            code = 1
            try:
                zero3_rank(folder, rank, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # no clean-up: a dead peer would be waited for
    pid, status = os.wait()
    if status != 0:
        os.kill(next(other for other in ranks if other != pid), 9)
    os.wait()
    sys.exit(int(status != 0))


def test_zero3(tmp_path: Path, on_data: list[Any]) -> None:
    """A run as of TRL in one process, and the mean over what the student wrote in both processes."""
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.test_trl", str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    logs = "".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr[-3000:] + logs

    def left(name: str) -> list[Any]:
        return [torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]

    found, weights, _, held = left("data")[0]
    assert held == 0, "the teacher is sharded too: ZeRO-3 keeps its share apart from the parameters"
    assert found == pytest.approx(losses(on_data[1]), rel=RUN)
    assert_same_weights(weights, on_data[1])
    ranks = left("distillation")
    batches = [of_distillation(inputs) for _, _, seen, _ in ranks for inputs in seen]
    total, count = divergence(pair(), batches, beta=0.5)
    assert len(batches) == 4 and count > 4
    assert ranks[0][0] == pytest.approx([total / count], rel=FP32)


def of_distillation(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of ``DistillationTrainer`` in the form of GKD's."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([torch.zeros_like(inputs["prompt_ids"]), inputs["completion_mask"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(mask == 0, -100)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
