"""What comes before preferences: a projector that is aligned, and an MLLM that is instructed."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.config import Train
from pivot_plugin.data.conversations import ConversationDataset, load_conversations
from pivot_plugin.data.launch import this_launch
from pivot_plugin.data.records import Judge
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.data.skipped import SKIPPED_FILE
from pivot_plugin.encoders.compatibility import rewrite_for_every_release
from pivot_plugin.files import whole_folder
from pivot_plugin.training.cost import Cost
from pivot_plugin.training.instruct_trainer import InstructTrainer
from pivot_plugin.training.looks import Look
from pivot_plugin.training.processes import Processes
from pivot_plugin.training.sharding import refuse_use
from pivot_plugin.verdict import Verdict

from .leftovers import MODEL_FOLDER, put_back, trained_in
from .outcome import has_moved, judged
from .provenance import instructed_origin
from .result import as_lines, as_table
from .run import LoadRows, Run, RunOptions, begin, merge_lora
from .settings import instruct_configuration

# arXiv 2510.16333, appendix E.1, stage 1; found again in the authors' scripts
ALIGN = {"learning_rate": 1e-3}
INSTRUCT = {"learning_rate": 1e-5}
TOWER_RATE = 2e-6
GLOBAL_BATCH = 256


@dataclass(repr=False)
class InstructResult:
    """A finished alignment or instruction.

    Attributes:
        model: the MLLM, LoRA merged.
        processor: the one it was trained with.
        output_dir: the run's folder; its `model` is an ordinary transformers folder.
        metrics: the last held-out loss and token accuracy, empty where nothing was held out.
        history: the trainer's log, a dict per entry.
        trained: per part, parameters that trained and parameters there are.
        settings: the options that the run was started with.
        cost: time, memory and floating-point operations.
        verdict: what the run came to: the held-out loss before and after, where rows were held out.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    output_dir: Path
    metrics: dict[str, float]
    history: list[dict[str, float]]
    trained: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    cost: Cost = field(default_factory=Cost)
    verdict: Verdict = field(default_factory=lambda: Verdict(subject="model"))

    def __repr__(self) -> str:
        return as_lines(self._told())

    def _repr_html_(self) -> str:
        return as_table(self._told())

    def _told(self) -> list[tuple[str, str]]:
        """What happened, what came of it, and where the model is."""
        verdict, folder = self.verdict, self.output_dir / MODEL_FOLDER
        parts = " and ".join(part.replace("_", " ") for part, (trained, _) in self.trained.items() if trained)
        first, *others = verdict.sentences() or [""]
        steps = f"{verdict.taken:,} of {verdict.planned:,} steps in {self.cost.seconds:,.0f} s"
        return [
            ("run", f"{steps}; {parts} of {type(self.model).__name__}"),
            ("verdict", f"{verdict.title}. {first}"),
            ("more", " ".join(others) or "-"),
            ("next", f"the whole model is in {folder}: pivot optimize {folder} PAIRS"),
        ]


def align(
    model: PreTrainedModel | str | Path,
    captions: object,
    *,
    processor: ProcessorMixin | None = None,
    output_dir: str | Path = "pivot-align",
    image_folder: str | Path | None = None,
    plain: bool = True,
    eval_fraction: float = 0.0,
    on_bad_row: OnBadRow = "raise",
    resume: bool = False,
    **settings: Any,
) -> InstructResult:
    """Teach an MLLM's projector the language of its language model; all else stays as it is.

    Args:
        model: a loaded MLLM, trained in place, or the path or Hub id of one.
        captions: images with captions, in any form `preferences.load_conversations` takes, such as LLaVA-Pretrain's
            json.
        processor: the model's; found by its name where not given.
        output_dir: folder of the run: checkpoints, run.json and the whole model in `model`.
        image_folder: what relative image paths start from; the data's own folder where None.
        plain: leave questions out, as LLaVA and the paper do.
        eval_fraction: share of the rows to hold out.
        on_bad_row: as for `optimize`.
        resume: go on from the last complete checkpoint in `output_dir`; as for `optimize`, a finished run is finished.
        **settings: any field of `InstructConfig`, which has all of TRL's SFTConfig. Learning rate 1e-3, one epoch, and
            gradients accumulated to a batch of 256 unless given.

    Returns:
        the model and its log.

    Raises:
        SettingsError, DataError, ModelError, TrainingError: as `optimize`.

    Source:
        arXiv 2510.16333, section 3.1 and appendix E.1, stage 1: 558K captions, learning rate 1e-3, batch 256, 1 epoch,
        plain prompt; after LLaVA-1.5 (arXiv 2310.03744).
    """
    defaults = ALIGN | {"plain": plain}
    config = instruct_configuration(
        defaults, settings, Path(output_dir), "projector", held_out=eval_fraction > 0, batch=GLOBAL_BATCH
    )
    options = RunOptions(config, defaults | settings, None, eval_fraction, on_bad_row, resume)
    return _instruct(model, processor, options, partial(_load_rows, captions, image_folder, options))


def instruct(
    model: PreTrainedModel | str | Path,
    conversations: object,
    *,
    train: Train = "projector+language_model",
    lora: int | LoraConfig | None = None,
    processor: ProcessorMixin | None = None,
    output_dir: str | Path = "pivot-instruct",
    image_folder: str | Path | None = None,
    eval_fraction: float = 0.0,
    on_bad_row: OnBadRow = "raise",
    resume: bool = False,
    **settings: Any,
) -> InstructResult:
    """Teach an MLLM to answer questions about images.

    Args:
        model: a loaded MLLM, trained in place, or the path or Hub id of one.
        conversations: in any form `preferences.load_conversations` takes, such as LLaVA-OneVision's or Cambrian's rows;
            text-only ones are welcome. Every answer is in the loss, nothing else is.
        train: "projector+language_model", "all" (the paper's first stage), or other parts as for `optimize`.
        lora: LoRA rank, peft config, or None to train the weights themselves.
        processor, output_dir, image_folder, eval_fraction, on_bad_row, resume: as for `align`.
        **settings: any field of `InstructConfig`, which has all of TRL's SFTConfig. Learning rate 1e-5, of the tower
            2e-6, one epoch, at most 2048 tokens, and gradients accumulated to a batch of 256 unless given.

    Returns:
        the model and its log.

    Raises:
        SettingsError, DataError, ModelError, TrainingError: as `optimize`.

    Source:
        arXiv 2510.16333, section 3.1 and appendix E.1, stage 1: 3.2M conversations, learning rate 1e-5, vision tower
        2e-6, batch 256, 1 epoch, 2048 tokens.
    """
    defaults: dict[str, Any] = dict(INSTRUCT)
    if "encoder" in train or train == "all":
        defaults["learning_rates"] = {"encoder": TOWER_RATE}
    if "learning_rate" in settings:
        # a rate of one's own is meant for all parts
        defaults = {}
    config = instruct_configuration(
        defaults, settings, Path(output_dir), train, held_out=eval_fraction > 0, batch=GLOBAL_BATCH
    )
    options = RunOptions(config, defaults | settings, lora, eval_fraction, on_bad_row, resume)
    return _instruct(model, processor, options, partial(_load_rows, conversations, image_folder, options))


def _instruct(
    model: PreTrainedModel | str | Path, processor: ProcessorMixin | None, options: RunOptions, load_rows: LoadRows
) -> InstructResult:
    """Supervised fine-tuning from options to result; arguments as for `begin`."""
    processes = Processes(options.config.distributed_state)
    with processes.together():
        return _instructed(begin(model, processor, options, load_rows, processes))


def _instructed(run: Run) -> InstructResult:
    """A run that is ready, from its rows to its result."""
    run.announce()

    metrics: dict[str, float] = {}
    looks: list[Look] = []
    measured = run.held_out is not None and run.ended is None
    with run.in_place() as training:
        if run.ended is not None and run.left is not None:
            put_back(run.left, run.adapter)
            trained, history, planned = trained_in(run.ended), [], 0
        else:
            trainer = InstructTrainer(**run.trainer_arguments())
            trained = trainer.trained_parameters()
            if measured:
                looks.append(trainer.look_now())
            run.train(trainer)
            if measured:
                looks.append(trainer.look_now())
                metrics = {name: float(value) for name, value in trainer.evaluate().items()}
            history, planned = trainer.state.log_history, trainer.state.max_steps
            if run.ended is None:
                _save_model(run, trainer)
            else:
                merge_lora(trainer)
            # with it goes the memory of its optimiser
            del trainer

    result = InstructResult(
        model=run.model,
        processor=run.processor,
        output_dir=run.output_dir,
        metrics=metrics if run.ended is None else run.ended["metrics"],
        history=history if run.ended is None else run.ended["history"],
        trained=trained,
        settings=run.settings,
        cost=training.cost if run.ended is None else Cost(**run.ended["cost"]),
        verdict=(
            judged(run, (looks, []), history, planned, has_moved(run.model, training.before))
            if run.ended is None
            else Verdict.from_dict(run.ended.get("verdict")) or Verdict(subject="model")
        ),
    )
    if run.keeper and run.ended is None:
        run.record(result, origin=instructed_origin(run), verdict=result.verdict.as_dict())
    refuse_use(run.model)
    run.wait()
    return result


def _load_rows(
    source: object, image_folder: str | Path | None, options: RunOptions, judge: Judge
) -> tuple[ConversationDataset, None]:
    """The conversations to train on, looked at one by one; none are given to be held out."""
    rows = load_conversations(source, image_folder=image_folder)
    return rows.verify(options.on_bad_row, options.folder / SKIPPED_FILE, judge, this_launch()), None


def _save_model(run: Run, trainer: InstructTrainer) -> None:
    """Write the whole model, LoRA merged, as an ordinary transformers folder; to be called by every process."""
    folder = run.output_dir / MODEL_FOLDER
    # gathers what FSDP and DeepSpeed keep in shards
    merge_lora(trainer)
    if run.keeper:
        with whole_folder(folder) as aside:
            run.model.save_pretrained(aside)
            rewrite_for_every_release(aside)
            run.processor.save_pretrained(aside)
