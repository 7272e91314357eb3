"""Trains tiny models in one process or in several, as listed in a file; run by test_distributed.py.

``python -m tests.training.distributed_worker plans.json`` imports everything once and forks the processes of each
launch. A process that dies takes the others of its launch with it, as under torchrun.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from fused_kd.integrations.own import OwnTeacher
from fused_kd.training.cache import write_cache
from fused_kd.training.checkpoints import last_checkpoint
from fused_kd.training.collate import Collator
from fused_kd.training.contexts import with_context
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import KDTrainer
from tests.training.caching import Words
from tests.training.scripts import script
from tests.training.tiny import VOCAB, rows
from tests.training.tiny import tiny as tiny_model

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # partition even the smallest parameter
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


def tiny(hidden: int, seed: int, tied: bool = False, dropout: float = 0.0) -> transformers.PreTrainedModel:
    return tiny_model(hidden, seed, tie_word_embeddings=tied, attention_dropout=dropout)


def with_lora(model: transformers.PreTrainedModel, **options: Any) -> Any:
    import peft

    torch.manual_seed(7)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0, **options}
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():  # B starts at 0, which would hide A's gradient
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def experts() -> transformers.PreTrainedModel:
    torch.manual_seed(4)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def whole(model: torch.nn.Module, engine: str) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    gathered = {}
    for name, parameter in model.named_parameters():
        if engine == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        else:
            value = parameter.detach()
            value = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        gathered[name.removeprefix("module.")] = value.cpu()
    return gathered


class Cache:
    """A cached teacher: its top entries come with the rows."""

    tail = "bucket"


@torch.no_grad()
def with_top_k(data: list[dict[str, list[int]]], count: int = 8, teacher: Any = None) -> list[dict[str, Any]]:
    """The rows with the teacher's top entries for each label with loss."""
    teacher = (teacher or tiny(24, seed=2)).eval()
    made = []
    for row in data:
        targets = torch.tensor(row["labels"])[1:] != -100
        logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][targets]
        top = logits.log_softmax(-1).topk(count)
        made.append({**row, "teacher_log_probs": top.values, "teacher_indices": top.indices})
    return made


def with_states(folder: Path, data: list[dict[str, list[int]]]) -> tuple[TeacherCache, Any]:
    """A cache of the teacher's hidden states, and the rows with them."""
    options = {"keep": "hidden", "dtype": "fp32", "template": "tiny", "progress": False}
    cache = write_cache(folder, tiny(24, seed=2), Words(VOCAB), data, **options)  # type: ignore[arg-type]
    return cache, cache.rows(data)


def held(model: torch.nn.Module) -> int:
    """Elements of the model's weights that this process has in memory."""
    return sum((each.to_local() if hasattr(each, "to_local") else each).numel() for each in model.parameters())


class Snapshots(transformers.TrainerCallback):
    """Keeps the weights before the first step, after it and at the end."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(whole(model, self.engine))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in (1, state.max_steps):
            self.weights.append(whole(model, self.engine))


class Killed(KDTrainer):
    """Kills its last process with SIGKILL while the checkpoint of step ``kill`` is written: the first has no more to
    write than what makes the checkpoint count."""

    kill = 0

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == self.kill and self.args.process_index == self.args.world_size - 1:
            while not (Path(output_dir) / "rng_state_0.pth").exists():
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def run_case(case: dict[str, Any], folder: Path, engine: str, processes: int) -> dict[str, Any]:
    """Train as ``case`` says; in one process the batches are as large as those of all processes together."""
    batch = 2 if processes > 1 else 4
    options: dict[str, Any] = {
        "output_dir": str(folder / case.get("output", case["name"])),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "max_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **case.get("arguments", {}),
    }
    if case.get("experts") and processes == 1:  # a router's loss is of a micro-batch, so these must be the same
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if engine == "fsdp2" and not case.get("pretrained"):
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "state_dict_type": case.get("state_dict", "SHARDED_STATE_DICT"),
            "cpu_ram_efficient_loading": "state_dict" in case,
        }
    if engine == "zero3" and not case.get("pretrained"):
        options["deepspeed"] = copy.deepcopy(ZERO3)
    if engine == "ddp":
        options["use_cpu"] = True
    arguments = transformers.TrainingArguments(**options)
    data = rows(case.get("rows", 19))
    evaluated: Any = with_top_k(rows(7, seed=9)) if case.get("cached") else rows(7, seed=9)
    teacher: Any = tiny(24, seed=2, tied=case.get("tied", False))
    if case.get("cached"):
        teacher, data = Cache(), with_top_k(data)
    if case.get("states"):  # a copy for each process
        own = folder / f"{case['name']}.cache{arguments.process_index}"
        teacher, data = with_states(own / "train", data)
        evaluated = with_states(own / "valid", evaluated)[1]
    student = tiny(16, seed=1, tied=case.get("tied", False), dropout=case.get("dropout", 0.0))
    if case.get("pretrained"):  # after the arguments, which tell transformers how to load
        student, teacher = (load(folder.parent / name) for name in ("student", "teacher"))
    if "state_dict" in case and arguments.process_index > 0:
        for parameter in [*student.parameters(), *teacher.parameters()]:
            parameter.data.zero_()
    if case.get("lora"):
        student = with_lora(student, **case.get("adapters", {}))
    if case.get("experts"):
        student = experts()
    if case.get("own_base"):
        teacher = student
    if "own" in case:
        teacher = OwnTeacher(**case["own"])
    if case.get("several") == "mixture":
        teacher = [(0.6, teacher), (0.4, tiny(32, seed=3))]
    elif case.get("several"):
        teacher = [teacher, tiny(32, seed=3)]
        data, evaluated = (
            [{**row, "teacher_id": i // 2 % 2} for i, row in enumerate(each)] for each in (data, evaluated)
        )
    if case.get("context"):
        data, evaluated = (list(with_context(each, None, case["context"])) for each in (data, evaluated))
    snapshots = Snapshots(engine)
    trainer = (Killed if "kill" in case else KDTrainer)(
        student,
        teacher,
        case["objective"],
        statistics=case.get("statistics", ()),
        args=arguments,
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=Collator(0),
        callbacks=[snapshots],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.kill = case.get("kill", 0)
    checkpoint = None
    if case.get("resume"):
        output = Path(options["output_dir"])
        checkpoint = last_checkpoint(output) if case["resume"] == "last" else output / case["resume"]
    train_loss = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).training_loss
    evaluated = trainer.evaluate()
    trainer.save_model(str(folder / f"{case['name']}.saved"))
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": snapshots.weights,
        "train_loss": train_loss,
        "teacher_held": None if trainer.teacher is None else held(trainer.teacher),
        "evaluated": {name: evaluated.get(f"eval_{name}") for name in ("loss", "ce", "perplexity", "kl", "top_1")},
        "resumed": None if checkpoint is None else checkpoint.name,
    }


def shard_on_cpu(engine: str) -> None:
    """Let Accelerate shard over gloo, which it does on accelerators only."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if engine == "zero3":
        # minutes of compiling, for speed alone
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def environment_of(config: str) -> dict[str, str]:
    """What ``accelerate launch --config_file`` tells its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", config, "script.py"])
    arguments = _validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    kept = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {key: value for key, value in made.items() if key not in kept}


def run_rank(launch: dict[str, Any], rank: int, port: int) -> None:
    folder = Path(launch["folder"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    log = os.open(folder / f"{launch['name']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if launch["engine"] != "ddp":
        shard_on_cpu(launch["engine"])
    if "config" in launch:
        os.environ.update(environment_of(launch["config"]), ACCELERATE_MIXED_PRECISION="no")
    if "train" in launch:
        script("train").main(launch["train"])
    for case in launch.get("cases", ()):
        result = run_case(case, folder, launch["engine"], 2)
        if rank == 0:
            torch.save(result, folder / f"{case['name']}.pt")


def run_launch(launch: dict[str, Any]) -> list[int]:
    """Exit codes of the two processes, -9 for a killed one; both are, where they take more than four minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_rank(launch, rank, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # no clean-up: a dead peer would be waited for
        ranks[pid] = rank
    codes = [0, 0]
    end = time.monotonic() + 240
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
            if time.monotonic() < end:
                continue
            code = -signal.SIGKILL
        else:
            code = os.waitstatus_to_exitcode(status)
            codes[ranks.pop(pid)] = code
        if code != 0:
            for other, rank in ranks.items():
                os.kill(other, signal.SIGKILL)
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
            ranks = {}
    return codes


def main() -> None:
    torch.set_num_threads(1)
    for name in ("deepspeed", "functorch.compile", "numpy.ctypeslib", "peft", "torch.distributed.fsdp"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # the engines collect often, and walk through all that is imported
    path = Path(sys.argv[1])
    codes = {}
    for launch in json.loads(path.read_text()):
        ended = run_launch(launch)
        if -signal.SIGSEGV in ended:  # a thread of gloo's, seen once in many runs
            ended = run_launch(launch)
        codes[f"{launch['engine']} {launch['name']}"] = ended
        path.with_suffix(".codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
