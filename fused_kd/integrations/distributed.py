"""What several processes share: the sharded teacher, sums over ranks, the hard tokens of the whole step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch

from fused_kd.engines.problem import largest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainingArguments


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a process holds only its share of the weights (FSDP2, ZeRO-3)."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (deepspeed is not None and int(deepspeed.zero_stage) == 3)


def prepare_arguments(args: TrainingArguments | None) -> None:
    """Settle, before the Trainer reads them, what the routed forward needs."""
    if args is None:
        return
    if args.n_gpu > 1:
        args._n_gpu = 1  # DataParallel copies the model away from its routed forward; a launcher uses all devices
    if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # a search for them and checkpointing exclude each other


def check_fsdp(accelerator: Accelerator) -> None:
    """Raise ``ValueError`` for FSDP1, whose flattened weights no head can be read from."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, got {fsdp.fsdp_version}")


def check_engine(accelerator: Accelerator, args: TrainingArguments, model: PreTrainedModel, sized: bool) -> None:
    """Raise ``ValueError`` for what :class:`fused_kd.training.trainer.KDTrainer` cannot honour.

    ``sized``: whether the training set has a length, or no end.
    """
    check_fsdp(accelerator)
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError("model must not be sharded while it is loaded (distributed_config): leave that to Accelerate")
    parallel = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"{name} must be 1, got {getattr(parallel, name)}: every process needs tokens of its own")
    if accelerator.num_processes == 1:
        return
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(f"accelerator_config.{name} must be False: each process takes its slice of the batch")
    if not sized:
        raise ValueError("train_dataset must have a length, or no end, where several processes share it")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy must be 'random', 'sequential' or 'group_by_length' with several processes, "
            "got 'batch_rebalance'"
        )


def shard_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """The frozen teacher, sharded as the student is (FSDP2, ZeRO-3); call it on all ranks, the student prepared.

    FSDP2 shards it in place with the student's settings, block by block, and frees each block after its
    forward. ZeRO-3 gives an engine without an optimizer.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = accelerator.state.fsdp_plugin
        # the teacher's own blocks: the student's may have another class
        names, plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap, None
        try:
            sharded: torch.nn.Module = fsdp2_prepare_model(accelerator, teacher)
        finally:
            plugin.transformer_cls_names_to_wrap = names
        # no backward follows that would free what the forward leaves whole
        cast(Any, sharded).set_reshard_after_forward(True)
        return sharded
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine: torch.nn.Module = deepspeed.initialize(model=teacher, config=config)[0]
    engine.eval()
    return engine


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, the same on each."""
    if accelerator.num_processes == 1:
        return values
    total: torch.Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return total


def hard_threshold(accelerator: Accelerator, difficulties: Iterable[torch.Tensor], fraction: float) -> float:
    """Γ for which ``difficulty > Γ`` are the ``fraction`` hardest of all of ``difficulties``.

    ``difficulties``: one (n,) tensor a micro-batch, its valid tokens; those of all ranks are ranked together.
    Γ lies halfway between the last hard token and the first easy one; tokens that tie there are all easy.
    Waits for the device.
    """
    found = torch.cat([part.to(accelerator.device) for part in difficulties])
    if accelerator.num_processes > 1:
        found = accelerator.gather(accelerator.pad_across_processes(found, pad_index=-1.0))
        found = found[found > -0.5]  # without the padding; rounding may leave a difficulty just below 0
    hard = largest(found, torch.zeros_like(found, dtype=torch.int64), torch.tensor(fraction, dtype=torch.float32))
    if not hard.any():
        return math.inf
    if hard.all():
        return 0.0
    return max(float(found[hard].min() + found[~hard].max()) / 2, 0.0)
