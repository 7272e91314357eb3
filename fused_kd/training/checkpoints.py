"""Whole folders: a manifest with every file's size, written last, when all of them are on disk."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from fused_kd.training.stage import flush, read_json, remove_folder, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")


def seal(folder: Path) -> None:
    """Put all that is in a folder on disk, and then its manifest: from now on it counts as whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (*folder.rglob("*"), folder):
        flush(path)
    write_json(folder / MANIFEST, {"files": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def fault_of(folder: Path) -> str | None:
    """Why a folder has not all that :func:`seal` saw in it, or None where it has: files are compared by their sizes."""
    manifest = read_json(folder / MANIFEST)
    sealed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sealed, dict) or not sealed:
        return f"has no {MANIFEST} that can be read, which is written last"
    found = _sizes(folder)
    for name, size in sealed.items():
        if name not in found:
            return f"lacks {name[:80]}"
        if found[name] != size:
            return f"has {found[name]} bytes of {name} instead of {size}"
    return None


def last_checkpoint(folder: Path, *, set_aside: bool = False) -> Path | None:
    """The newest whole checkpoint of a training, whose best one, where it names one, is whole too.

    Warns of each newer one that is not; ``set_aside`` renames these to ``damaged-checkpoint-STEP``.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        fault = fault_of(path) or _fault_of_best(path)
        if fault is None:
            return path
        warnings.warn(f"{path} {fault}: passed over for the checkpoint before it", stacklevel=2)
        if set_aside:
            aside = path.with_name(f"damaged-{path.name}")
            remove_folder(aside)
            path.rename(aside)
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    state = read_json(checkpoint / "trainer_state.json")
    if not isinstance(state, dict):
        return "has no trainer_state.json that can be read"
    named = state.get("best_model_checkpoint")
    if named is None:
        return None
    best = _best(checkpoint, named)
    if best is None:
        return f"has a best_model_checkpoint that is no checkpoint's path: {str(named)[:80]!r}"
    if best == checkpoint:
        return None
    fault = fault_of(best)
    return fault and f"needs the best one, {best.name}, which {fault}"


def _best(checkpoint: Path, named: Any) -> Path | None:
    """The best checkpoint that a checkpoint's state names: beside it, wherever the run was when that was written."""
    name = Path(named).name if isinstance(named, str) else ""
    return checkpoint.with_name(name) if _NAME.fullmatch(name) else None


def check_room(folder: Path, model: torch.nn.Module) -> None:
    """Raise ``ValueError`` unless a disk has room for two of a model's checkpoints with AdamW's state.

    What lies in ``folder`` already counts as room, as it will be replaced. An adapted model keeps its adapters alone.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = trained if hasattr(model, "peft_config") else sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 2 * (kept + 2 * trained)
    old = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = _free(folder)
    if free + old < needed:
        raise ValueError(
            f"output: two checkpoints take {needed / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB free"
        )


def _free(folder: Path) -> int:
    """Bytes free on the disk where a folder is or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


class _BestOfMoved(TrainerCallback):
    """After a resume, points the state to the best checkpoint where it lies now."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        best = _best(self.checkpoint, state.best_model_checkpoint)
        if best is not None and fault_of(best) is None:
            state.best_model_checkpoint = str(best)


class WholeCheckpoints(Trainer):
    """A Trainer that seals its checkpoints and resumes from whole ones alone."""

    def last_checkpoint(self) -> str | None:
        """Path of the newest whole checkpoint, or None; those that are not whole are set aside.

        All processes of a distributed run call this.
        """
        with self.accelerator.main_process_first():
            found = last_checkpoint(Path(str(self.args.output_dir)), set_aside=self.is_world_process_zero())
        return None if found is None else str(found)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True takes the newest whole checkpoint.

        Raises:
            ValueError: the checkpoint is not whole, or, for True, there is none that is.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True: there is no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint and (fault := fault_of(Path(resume_from_checkpoint))):
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} {fault}: give a whole one, or, if you know "
                "that another trainer wrote it to its end, call fused_kd.training.checkpoints.seal(Path(...)) on it"
            )
        if resume_from_checkpoint:
            self.add_callback(_BestOfMoved(Path(resume_from_checkpoint)))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(_BestOfMoved)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            free = _free(folder)
            raise OSError(
                f"{folder} could not be written, with {free} bytes free there ({type(error).__name__}: {error}); the "
                "same command goes on from the checkpoint before it"
            ) from error
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            seal(folder)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if fault := fault_of(best):
            raise ValueError(f"the best checkpoint {best} {fault}: the same command trains it again")
        super()._load_best_model()
