"""Teachers that are not one model, where TRL's trainers look for theirs."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch

from fused_kd.integrations.arguments import as_teachers
from fused_kd.integrations.forms import GivenForm, Teaching, is_given
from fused_kd.integrations.heads import check_head_module
from fused_kd.integrations.taught import check_lists, teaching_of
from fused_kd.objectives import Objective


class OtherTeachers(torch.nn.Module):
    """Stands where TRL looks for its teacher, for teachers that are not one model.

    Args:
        model: the student. given: what a trainer takes as teachers. args: TRL's.

    Raises:
        TypeError, ValueError: teachers that do not go with TRL's trainers.
    """

    def __init__(self, model: Any, given: Any, args: Any) -> None:
        super().__init__()
        self._teachers, self._weights = as_teachers(given)
        if isinstance(model, str):
            raise ValueError(f"model must be a model with such a teacher, got its name {model!r}")
        if len(self._teachers) > 1 and self._weights is None:
            raise ValueError("teacher_model must be [(weight, teacher), ...]: no row of TRL's says whose it is")
        for each in self._teachers:
            columns = GivenForm(each).given.columns if is_given(each) else ()
            if columns:
                raise ValueError(
                    f"teacher_model must be no cache, got {each!r}: the student writes what it is trained on; use "
                    "KDTrainer, or KDLossMixin before trl.SFTTrainer"
                )
            if isinstance(each, torch.nn.Module):
                check_head_module(cast(Any, each), plain=True)
        if getattr(args, "seq_kd", False):
            raise ValueError("seq_kd must be False with such a teacher, which writes no text")
        self.config = copy.deepcopy(model.config)
        self._is_accelerate_prepared = True

    def teaching(self, student: Any, accelerator: Any, objective: Objective, options: dict[str, Any]) -> Teaching:
        """The teachers, bound to the student and on its device.

        Raises:
            ValueError: teachers that do not go with the student, the objective or the loss's options.
        """
        check_lists(self._teachers, self._weights, objective, options, ())
        found = teaching_of(self._teachers, self._weights, student)
        assert found is not None
        for form in found.models:
            form.model = accelerator.prepare_model(form.model.requires_grad_(False).eval(), evaluation_mode=True)
        return found
