"""What every trainer of this package has in common: what trains, at which rate, and an eye on it while it does.

`TowerTraining` stands in front of one of TRL's trainers:

    class PivotTrainer(TowerTraining, DPOTrainer)
    class Rollouts(TowerTraining)
    class PivotGRPOTrainer(Rollouts, GRPOTrainer)
    class InstructTrainer(TowerTraining, SFTTrainer)

Overrides, and why each is needed:
    create_optimizer    parts may have learning rates of their own
    _run_epoch          transformers looks after a step alone whether a run is at its end, and resumes it past that
    _save               PEFT notes the name of a LoRA's base, and not which weights it was on
    _save_rng_state     of several processes the last to write may be any, and one may be killed before that
    _save_checkpoint    transformers writes whole models under older names, which its trainer does not find again
    create_model_card   TRL writes one with every checkpoint, about the run's folder
    evaluate            what each held-out row scored, by which noise is told from change
    prediction_step     the same
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import TowerConfig
from pivot_plugin.errors import SettingsError, TrainingError
from pivot_plugin.models.evaluating import undisturbed
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.image_tokens import ImageTokens
from pivot_plugin.models.merging import note_adapted_weights

from . import forward
from .attention import attend_by, packing_attention, take_masks
from .forest_check import read_rows
from .forward import ForestReading
from .gradient_check import GradientCheck
from .held_out import HeldOutLoader
from .looks import AfterWarmUp, Patience
from .plan import TrainingPlan, count_parameters, original_name, places_of_parts, plan, unwrapped
from .sharding import undivided, wrap_layers
from .watch import Watch

logger = logging.getLogger(__name__)


class TowerTraining(Trainer):
    """The part of a trainer that knows what trains.

    A subclass calls `_prepare_model` before its parent's constructor and `_watch_training` after it, and hands every
    loss it computes to `_checked`.
    """

    optimizer: torch.optim.Optimizer | None
    # conversations have nothing to share, and are computed as TRL does
    _through_forest = True
    reading: ForestReading

    def _prepare_model(
        self,
        model: PreTrainedModel | PeftModel,
        settings: TowerConfig,
        processor: ProcessorMixin | None,
        lora: int | LoraConfig | None,
        adapter: VisionAdapter | None,
        training_plan: TrainingPlan | None,
    ) -> LoraConfig | None:
        """Find the adapter, make sure that model and processor fit, and switch gradients on where they belong.

        Args:
            model, settings, processor, lora, adapter: as the trainer was given them.
            training_plan: what trains; made here where None. A peft model trains as it is.

        Returns:
            the peft config for TRL.
        """
        if processor is None:
            raise SettingsError(
                f"{type(self).__name__} got no processor.", "Pass processing_class=AutoProcessor.from_pretrained(...)."
            )
        base = unwrapped(model)
        self.adapter = adapter or find_adapter(base)
        check_processor(base, processor, self.adapter)
        self._answers_from_forest = False
        self.saw_images = False
        self._rows_of_step: list[str] = []
        self._looked: list[np.ndarray] = []
        self._row_scores: torch.Tensor | None = None
        self.plan: TrainingPlan | None = None
        if isinstance(model, PeftModel):
            return None
        self.plan = training_plan or plan(self.adapter, settings.train, lora, settings.frozen or ())
        trained = set(self.plan.parameters)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trained)
        return self.plan.lora

    def _read_forest(
        self,
        model: PreTrainedModel | PeftModel,
        settings: TowerConfig,
        processor: ProcessorMixin,
        rows: Sequence[Mapping[str, Any]],
    ) -> ForestReading:
        """How the model reads a forest, shown on some of the rows before anything else is computed.

        Args:
            model, settings, processor: as the trainer was given them.
            rows: of the data, in the normal form of pairs.

        Raises:
            ModelError: if the model computes something else in training than by itself.
        """
        base = unwrapped(model)
        if earlier := take_masks(base):
            logger.info(
                "%s runs with %s instead of %s, which takes no masks of trees.",
                type(base).__name__,
                base.config.get_text_config()._attn_implementation,
                earlier,
            )
        # by which the model writes; trees may be computed by another
        self._plain_attention: str = base.config.get_text_config()._attn_implementation
        # engines that shard a model, and device maps, decide themselves where it is
        if not (settings.fsdp or settings.deepspeed or hasattr(base, "hf_device_map")):
            base.to(settings.device)
        with undivided():
            reading = read_rows(base, self.adapter, processor, rows, packing_attention(base))
        if reading.no_trees is None and not reading.layout.packed:
            logger.info("%s gets one tree per row, padded to the largest.", type(base).__name__)
        if reading.no_trees is not None:
            logger.warning(
                "%s gets one sequence per row, images still encoded once: %s.", type(base).__name__, reading.no_trees
            )
        if others := self.adapter.other_tower_paths:
            logger.warning(
                "Images of %s also go through %s, which stays as it is: what trains is %s.",
                *(type(base).__name__, ", ".join(others), self.adapter.tower_path),
            )
        if reading.own_head:
            logger.info("%s scores tokens by its own head; TRL's computes something else.", type(base).__name__)
        return reading

    def _watch_training(self) -> None:
        self.add_callback(GradientCheck(self))
        if self._through_forest:
            self.add_callback(Watch(self.beta))
        self.add_callback(AfterWarmUp)
        if self.args.patience is not None and self.args.eval_strategy != "no" and self.args.metric_for_best_model:
            self.add_callback(Patience(self.args.patience, self.args.min_delta))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; meanwhile what each row scores is kept for those who judge the look."""
        self._looked = []
        measured: dict[str, float] = super().evaluate(*args, **kwargs)
        return measured

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's. The log of a look is written before callbacks are told of it, who find its rows then."""
        super().log(logs, start_time)
        if any(name.startswith("eval_") for name in logs):
            for callback in self._patience:
                callback.rows = self.rows_of_look

    @property
    def rows_of_look(self) -> np.ndarray:
        """(n,) what each held-out row scored at the last look, higher is better; empty where none are told."""
        return np.concatenate(self._looked) if self._looked else np.zeros(0)

    @property
    def _patience(self) -> list[Patience]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Patience)]

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._row_scores = None
        result = super().prediction_step(*args, **kwargs)
        if self._row_scores is not None:
            everyones = self.accelerator.gather_for_metrics(self._row_scores).float().cpu().numpy()
            loader = self.callback_handler.eval_dataloader
            # what is left over when rows are dealt out, every process computes
            self._looked.append(everyones[: loader.pairs] if isinstance(loader, HeldOutLoader) else everyones)
        return result

    def _look_at_the_start(self) -> None:
        """Make the start a candidate for the best checkpoint: a look at it, and a checkpoint of it."""
        if not self.args.load_best_model_at_end or self.state.global_step or self.state.best_metric is not None:
            return
        # what training draws does not depend on a look
        with undisturbed(self.args.seed):
            self._determine_best_metric(self.evaluate(), None)
            self._save_checkpoint(self.model, None)
        # transformers takes a step 0 for none
        self.state.best_model_checkpoint = str(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-0")

    def _answer_from_forest(self) -> None:
        """Let policy and reference answer forest calls; TRL has given both their fused head by now."""
        if self._answers_from_forest:
            return
        self._answers_from_forest = True
        policy = unwrapped(self.accelerator.unwrap_model(self.model))
        # the temperature is the roll-outs'
        reading = replace(self.reading, temperature=getattr(self, "temperature", 1.0))
        forward.install(policy, self.adapter, reading, self._blank())
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            attend_by(unwrapped(reference), policy.config.get_text_config()._attn_implementation)
            forward.install(reference, find_adapter(reference), reading)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.at_its_end:
            self.control.should_training_stop = True
            return
        # here, and not where training begins: callbacks that look at the start themselves have done so
        self._look_at_the_start()
        super()._run_epoch(*args, **kwargs)

    @property
    def at_its_end(self) -> bool:
        """Whether no step is left: all are taken, or the watch has stopped the run."""
        early = self._patience
        return self.state.global_step >= self.state.max_steps > 0 or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in early
        )

    def _blank(self) -> dict[str, Any] | None:
        """Processor outputs of a blank image, for batches without images; None where no other process waits."""
        if self.accelerator.num_processes == 1:
            return None
        image_tokens = ImageTokens(self.processing_class, self.adapter.image_token_id)
        return dict(image_tokens.process_images([[Image.new("RGB", (56, 56))]]).inputs)

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent's; where FSDP runs, it is told which layers to divide."""
        super().create_accelerator_and_postprocess()
        wrap_layers(self.accelerator, self.adapter)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.world_size == 1:
            note_adapted_weights(model, Path(output_dir or self.args.output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the main process writes last that a checkpoint is complete: after all have written their parts
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's would lie in the run's folder, about a fine-tune of it knows not what; ours is the encoder's."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5 writes whole models under the names they had in older releases, which its own trainer does not
        # find again when it resumes or takes up the best checkpoint: the weights would silently stay as they are
        with _own_names(unwrapped(self.accelerator.unwrap_model(self.model))):
            super()._save_checkpoint(*args, **kwargs)

    def _checked(self, loss: torch.Tensor, model: torch.nn.Module, rows: list[str], images: bool) -> torch.Tensor:
        """The loss, with a gradient even where no image was in the batch.

        Args:
            loss: of a batch.
            model: that computed it.
            rows: names of the batch's rows.
            images: whether it shows any that the loss depends on.

        Raises:
            TrainingError: if it is not finite, naming the rows.
        """
        self.saw_images = self.saw_images or images
        if not torch.isfinite(loss):
            raise self._not_finite(f"The loss became {loss.item()}", rows)
        if model.training:
            self._rows_of_step += rows
        if torch.is_grad_enabled() and not loss.requires_grad:
            # no image in the batch, so nothing that trains was used: a zero gradient instead of an error
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return loss

    def _not_finite(self, what: str, rows: list[str]) -> TrainingError:
        distinct = list(dict.fromkeys(rows))
        return TrainingError(
            f"{what} at step {self.state.global_step} on {', '.join(distinct)}.",
            f"Look at these rows, lower the learning rate, or train in another precision. Checkpoints are in "
            f"{self.args.output_dir}.",
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with one group per learning rate where parts have their own."""
        if self.args.learning_rates and self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    part = self.adapter.part_of(original_name(name))
                    rate = self.args.learning_rates.get(part, self.args.learning_rate)
                    decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            optimizer_cls, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_cls(
                [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()], **settings
            )
        return super().create_optimizer()

    def trained_parameters(self) -> dict[str, tuple[int, int]]:
        """Per part, how many parameters train and how many there are."""
        return count_parameters(self.adapter, self.accelerator.unwrap_model(self.model))

    def parameter_table(self) -> str:
        """What trains, a line per part: parameters that train, of how many, and which modules count as the part."""
        model = type(unwrapped(self.accelerator.unwrap_model(self.model))).__name__
        places = places_of_parts(self.adapter)
        lines = [
            f"  {part:<15} {trained:>15,} of {total:>15,} parameters train: {places[part]}"
            for part, (trained, total) in self.trained_parameters().items()
        ]
        return "\n".join([f"{model}, family {self.adapter.family}:", *lines])


@contextmanager
def _own_names(model: PreTrainedModel) -> Iterator[None]:
    """Save a model under the names its weights have in memory meanwhile."""
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]
