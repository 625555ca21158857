"""Gradients looked at while a model trains: finite, and there at all."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.errors import TrainingError

from .plan import original_name

if TYPE_CHECKING:
    from .tower import TowerTraining

logger = logging.getLogger(__name__)


class GradientCheck(TrainerCallback):
    """Gradients are finite at every step, and after the first that saw an image every part that trains has one."""

    def __init__(self, trainer: "TowerTraining") -> None:
        self._trainer = trainer
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            logger.info(self._trainer.parameter_table())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        rows, trainer._rows_of_step = trainer._rows_of_step, []
        # with fp16 the gradient scaler meets infinite gradients and lowers its scale
        if not args.fp16:
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            if gradients and not torch.isfinite(norm := torch.nn.utils.get_total_norm(gradients)):
                raise trainer._not_finite(f"The gradient became {norm.item()}", rows)
        if self._done or not trainer.saw_images:
            return
        self._done = True
        reached: dict[str, bool] = {}
        for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if parameter.requires_grad:
                part = trainer.adapter.part_of(original_name(name))
                reached[part] = reached.get(part, False) or bool(
                    parameter.grad is not None and parameter.grad.abs().max() > 0
                )
        if unreached := [part for part, has_gradient in reached.items() if not has_gradient]:
            raise TrainingError(
                f"After the first step the {' and the '.join(unreached)} got no gradient at all, although it should "
                "train.",
                "The loss does not reach it: check that the model uses its images, that gradient checkpointing keeps "
                "gradients, and that the adapter names the right modules (`pivot inspect`).",
            )
