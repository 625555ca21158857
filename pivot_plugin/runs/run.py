"""What a run is, and the steps that every verb takes in the same order.

    options = RunOptions(...)                    what cannot be is refused before anything is loaded
    with processes.together():                   what goes wrong in one process ends all of them
    run = begin(model, ..., load_rows, ...)      the folder is claimed; model, plan and rows are there and alike
    run.announce()                               a record that says: not finished
    with run.in_place() as training:             whatever goes wrong here leaves the model as it was
        trainer = ...                            of the verb's own kind, made from `run.trainer_arguments()`
        run.train(trainer)                       from the first step, or from the last complete checkpoint
        merge_lora(trainer)
    run.record(result)                           a record that says: finished
    run.wait()

Of several processes one, the keeper, writes into the folder. The others wait for it where a run begins, so that none
trains in a folder that is refused, and where it ends, so that none reads what is not written yet.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, ProcessorMixin, Trainer

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import InstructConfig, RolloutConfig, TowerConfig
from pivot_plugin.data.judging import RowJudge
from pivot_plugin.data.pairs import PairStream
from pivot_plugin.data.rows import OnBadRow, RowDataset
from pivot_plugin.data.split import hold_out
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.models.find import check_processor, check_tower, find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.training.checkpoints import check_checkpoint, final_checkpoint, last_checkpoint
from pivot_plugin.training.cost import Cost
from pivot_plugin.training.judging import judge_of
from pivot_plugin.training.plan import TrainingPlan, lora_settings, plan
from pivot_plugin.training.processes import Processes
from pivot_plugin.training.sharding import check_engine, gather, undivided
from pivot_plugin.training.stopping import StopTogether

from .alike import check_code, check_folder, check_model, check_rows
from .display import Display, displayed
from .folder import claim, finished_record, this_process, write_record
from .in_place import InPlace, in_place
from .interrupt import interruptible
from .leftovers import whole_model
from .settings import unwatched
from .trackers import WhatTrains

logger = logging.getLogger(__name__)

LoadRows = Callable[[RowJudge], tuple[RowDataset | PairStream, RowDataset | None]]


@dataclass(frozen=True)
class RunOptions:
    """What a run is told, whole before anything is loaded.

    Attributes:
        config: of the trainer; its `output_dir` is the run's folder.
        choices: the verb's own options and the user's settings, by name.
        lora: a LoRA rank, a peft config, or None to train the weights themselves.
        eval_fraction: share of the rows to hold out where none are given for that.
        on_bad_row: "raise" or "skip".
        resume: whether to go on from the last complete checkpoint.
        display: what is shown while it trains, as for `displayed`.

    Raises:
        SettingsError: for a value that cannot be.
    """

    config: TowerConfig
    choices: Mapping[str, Any]
    lora: int | LoraConfig | None
    eval_fraction: float
    on_bad_row: OnBadRow
    resume: bool
    display: Display = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise SettingsError(f"eval_fraction is {self.eval_fraction}.", "Give a share of at least 0 and below 1.")
        if self.on_bad_row not in get_args(OnBadRow):
            raise SettingsError(
                f"on_bad_row is {self.on_bad_row!r}.", f"Choose {' or '.join(map(repr, get_args(OnBadRow)))}."
            )
        if self.display not in get_args(Display):
            raise SettingsError(f"display is {self.display!r}.", f"Choose one of {', '.join(get_args(Display))}.")
        if not isinstance(self.lora, int | LoraConfig | None):
            raise SettingsError(f"lora is {self.lora!r}.", "Give a rank of 1 or more, a peft LoraConfig, or None.")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir or ".")

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's record keeps of its options, and what a run must be given again to go on."""
        return {
            **self.choices,
            "train": self.config.train,
            "lora": lora_settings(self.lora) if isinstance(self.lora, LoraConfig) else self.lora,
            "eval_fraction": self.eval_fraction,
            "learning_rate": self.config.learning_rate,
        }


class Finished(Protocol):
    """What every verb's result has for the record of its run."""

    metrics: Any
    trained: dict[str, tuple[int, int]]
    history: list[dict[str, float]]
    cost: Cost


@dataclass(frozen=True)
class Run:
    """One training of one model in one folder, ready for its trainer.

    Attributes:
        base: folder or Hub id the model comes from, empty where that is not known.
        model: the MLLM, to be trained in place.
        processor: the model's.
        adapter: of the model's family.
        plan: what trains.
        rows: to train on, looked at already, where they are no stream.
        held_out: rows to measure on, None where there are none.
        options: what the run was told.
        ended: the record of the run where it has finished before; then it takes no step, and writes nothing.
        processes: that run it.
    """

    base: str
    model: PreTrainedModel
    processor: ProcessorMixin
    adapter: VisionAdapter
    plan: TrainingPlan
    rows: RowDataset | PairStream
    held_out: RowDataset | None
    options: RunOptions
    ended: Mapping[str, Any] | None = None
    processes: Processes = field(default_factory=lambda: Processes(None))

    @property
    def config(self) -> TowerConfig:
        """Of the trainer."""
        return self.options.config

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.options.folder

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's record keeps of its options."""
        return self.options.settings

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self.adapter.family

    @property
    def rows_are(self) -> str:
        """What a batch of the trainer counts."""
        if isinstance(self.config, RolloutConfig):
            return "roll-outs"
        return "conversations" if isinstance(self.config, InstructConfig) else "pairs"

    @property
    def keeper(self) -> bool:
        """Whether this process is the one that writes into the folder."""
        return _is_keeper(self.config)

    def announce(self) -> None:
        """Write the record of a run that is not finished."""
        if self.keeper and self.ended is None:
            write_record(self.output_dir, {"finished": False, "settings": self.settings, "process": this_process()})

    def in_place(self) -> AbstractContextManager[InPlace]:
        """Train the model meanwhile; see `in_place`."""
        return in_place(self.adapter, self.plan, self.output_dir, self.config.seed)

    def trainer_arguments(self) -> dict[str, Any]:
        """What every trainer of this package is made from."""
        return {
            "model": self.model,
            "args": self.config,
            "train_dataset": self.rows,
            "eval_dataset": self.held_out,
            "processing_class": self.processor,
            "adapter": self.adapter,
            "plan": self.plan,
        }

    def train(self, trainer: Trainer) -> None:
        """Train, from the last complete checkpoint where the run goes on with an earlier one."""
        # of a run that has ended, the last weights are wanted, and no step is taken
        every = getattr(trainer, "resumable_every", 1) if self.ended is None else 1
        found = last_checkpoint(self.output_dir, every) if self.options.resume and self.keeper else None
        # a process whose file system is a little behind would go on from another one
        checkpoint = self.processes.decided("checkpoint", str(found) if found else None)
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint), self.config.world_size)
        trainer.add_callback(StopTogether(trainer, self.processes, every))
        if self.ended is None:
            trainer.add_callback(WhatTrains(trainer))
        # of a run that has ended nothing is shown, and its log stays as it is
        shown: AbstractContextManager[object] = (
            nullcontext()
            if self.ended is not None
            else displayed(trainer, self.output_dir, self.rows_are, self.options.display)
        )
        try:
            # of one process, and of several
            with shown, interruptible(trainer, every), self.processes.stoppable():
                trainer.train(resume_from_checkpoint=checkpoint)
        except BaseException as error:
            if self.processes.failed_alike(error):
                # all are here, so that what an engine has divided can be put together, and then back; what failed first
                # must be seen, whatever comes of that
                with suppress(Exception):
                    _whole(trainer)
            raise

    @property
    def left(self) -> Path | None:
        """Where the model of an ended run that kept no checkpoint of its last step is taken from; else None."""
        if self.ended is None or final_checkpoint(self.output_dir, self.ended["history"]) is not None:
            return None
        return whole_model(self.output_dir, self.ended)

    def record(self, result: Finished, **details: Any) -> None:
        """Write the record of a finished run.

        Args:
            result: the verb's.
            **details: what only this verb records.
        """
        record = {
            "finished": True,
            "settings": self.settings,
            "metrics": result.metrics,
            "trained": result.trained,
            "history": result.history,
            "cost": asdict(result.cost),
            **details,
        }
        write_record(self.output_dir, record)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.config.distributed_state.wait_for_everyone()


def begin(
    model: PreTrainedModel | str | Path,
    processor: ProcessorMixin | None,
    options: RunOptions,
    load_rows: LoadRows,
    processes: Processes,
) -> Run:
    """Make a run ready for its trainer: cheap questions first, so that little is paid for before a refusal.

    Args:
        model: the MLLM, or the path or Hub id of one.
        processor: the model's; found by its name where None.
        options: what the run is told.
        load_rows: reads and checks, with a judge of what the model can take, the rows to train on and those held out,
            None for these where they are to be taken from the former.
        processes: that run it; each is compared with the first one.

    Raises:
        SettingsError: if the folder cannot be used, the options do not fit the model, or processes begin differently.
        ModelError, DataError: for a model or rows that cannot be used.
    """
    config = options.config
    check_engine(config)
    check_code(processes, options.folder, options.settings)
    base = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    if _is_keeper(config):
        claim(options.folder, options.settings, options.resume)
    check_folder(processes, options.folder)
    config.distributed_state.wait_for_everyone()
    ended = finished_record(options.folder) if options.resume else None
    with undivided():
        model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    check_tower(adapter)
    check_model(processes, model)
    training_plan = plan(adapter, config.train, options.lora, config.frozen or ())
    judge = judge_of(config, processor, adapter.image_token_id, every_size=options.on_bad_row == "skip")
    rows, held_out = load_rows(judge)
    if isinstance(rows, RowDataset):
        _check_images(rows, training_plan)
        _count_images(rows)
    if held_out is None and options.eval_fraction and isinstance(rows, RowDataset):
        rows, held_out = hold_out(rows, options.eval_fraction, config.seed)
    check_rows(processes, rows, held_out)
    if held_out is None:
        # of a stream or of very few rows none can be held out, and that shows only now
        unwatched(config)
    return Run(base, model, processor, adapter, training_plan, rows, held_out, options, ended, processes)


def _check_images(rows: RowDataset, training_plan: TrainingPlan) -> None:
    """Refuse rows without any image where nothing trains but what sees images.

    Raises:
        DataError: if no row has one.
    """
    parts = training_plan.parts
    if "language_model" in parts or rows.image_keys.any():
        return
    raise DataError(
        f"None of the {len(rows)} rows of {rows.name} has an image, and only the {' and the '.join(parts)} "
        "would train, which no text reaches.",
        "Give rows about images, or train the language model.",
    )


def _count_images(rows: RowDataset) -> None:
    """Say how many rows show no picture, where some do and some do not."""
    bare = sum(not key for key in rows.image_keys.tolist())
    if 0 < bare < len(rows):
        logger.warning(
            "%d of the %d rows of %s have no image: they teach an encoder nothing.", bare, len(rows), rows.name
        )


def merge_lora(trainer: Trainer) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
    """Make the model that was trained an ordinary one: what an engine has divided is gathered, the LoRA merged.

    To be called by every process. Of a model that was divided the main process has the weights, others none.

    Args:
        trainer: after training.

    Returns:
        the LoRA's configuration and its weights on the host, None where weights trained themselves.
    """
    model = _whole(trainer)
    if not isinstance(model, PeftModel):
        return None
    weights = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in get_peft_model_state_dict(model).items()
        if not tensor.is_meta
    }
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    model.merge_and_unload()
    return config, weights


def _whole(trainer: Trainer) -> PreTrainedModel | PeftModel:
    """The model that a trainer has trained, gathered from what an engine has divided; to be called by every process."""
    model: PreTrainedModel | PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    gather(model, trainer.accelerator, getattr(trainer, "deepspeed", None))
    return model


def _is_keeper(config: TowerConfig) -> bool:
    return config.process_index == 0
