"""Gradients looked at while a model trains: finite, and there at all."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pivot_plugin.errors import TrainingError

from .plan import original_name
from .sharding import anywhere, has_gradient, total_norm

if TYPE_CHECKING:
    from .tower import TowerTraining

logger = logging.getLogger(__name__)


class GradientCheck(TrainerCallback):
    """Gradients are finite at every step, and after the first that saw an image every part that trains has one."""

    def __init__(self, trainer: "TowerTraining") -> None:
        self._trainer = trainer
        self._done = False
        self._hooks: list[RemovableHandle] = []
        self._noted: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            logger.info(self._trainer.parameter_table())
        if self._trainer.is_deepspeed_enabled:
            # it keeps no gradients where they could be looked at
            self._hooks = [p.register_hook(partial(self._note, id(p))) for p, _ in self._trained()]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        rows, trainer._rows_of_step = trainer._rows_of_step, []
        # with fp16 the gradient scaler meets infinite gradients and lowers its scale
        if not args.fp16:
            norm = self._norm()
            if norm is not None and not math.isfinite(norm):
                raise trainer._not_finite(f"The gradient became {norm}", rows)
        if self._done:
            return
        parts = sorted({part for _, part in self._trained()})
        here = [any(self._reached(p) for p, part in self._trained() if part == name) for name in parts]
        # every process takes part, also those whose batches have shown no image yet
        seen, *flags = anywhere([trainer.saw_images, *here], trainer.accelerator)
        if not seen:
            return
        self._done = True
        for hook in self._hooks:
            hook.remove()
        reached = dict(zip(parts, flags, strict=True))
        if unreached := [part for part, has_gradient in reached.items() if not has_gradient]:
            raise TrainingError(
                f"After the first step the {' and the '.join(unreached)} got no gradient at all, although it should "
                "train.",
                "The loss does not reach it: check that the model uses its images, that gradient checkpointing keeps "
                "gradients, and that the adapter names the right modules (`pivot inspect`).",
            )

    def _norm(self) -> float | None:
        """Of all gradients, None where there are none."""
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:
            # the engine has made its step by now, and keeps the norm
            norm = trainer.model_wrapped.get_global_grad_norm()
            return None if norm is None else float(norm)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return total_norm(gradients) if gradients else None

    def _trained(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """The parameters that train, each with its part."""
        trainer = self._trainer
        for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if parameter.requires_grad:
                yield parameter, trainer.adapter.part_of(original_name(name))

    def _note(self, parameter: int, gradient: torch.Tensor) -> None:
        if parameter not in self._noted and bool((gradient != 0).any()):
            self._noted.add(parameter)

    def _reached(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._noted if self._trainer.is_deepspeed_enabled else has_gradient(parameter)
