"""What comes before preferences: a projector that is aligned, and an MLLM that is instructed."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from pivot_plugin.config import Train
from pivot_plugin.data.conversations import load_conversations
from pivot_plugin.data.rows import OnBadRow
from pivot_plugin.data.split import hold_out
from pivot_plugin.encoders.record import plain_name, versions
from pivot_plugin.errors import SettingsError
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.training.checkpoints import last_checkpoint
from pivot_plugin.training.cost import Cost
from pivot_plugin.training.instruct_trainer import InstructTrainer
from pivot_plugin.training.plan import plan

from .folder import claim, write_record
from .in_place import in_place
from .settings import instruct_configuration, unwatched

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
# arXiv 2510.16333, appendix E.1, stage 1; found again in the authors' scripts
ALIGN = {"learning_rate": 1e-3}
INSTRUCT = {"learning_rate": 1e-5}
TOWER_RATE = 2e-6
GLOBAL_BATCH = 256


@dataclass
class InstructResult:
    """A finished alignment or instruction.

    Attributes:
        model: the MLLM, LoRA merged.
        processor: the one it was trained with.
        output_dir: the run's folder; its `model` is an ordinary transformers folder.
        metrics: the last held-out loss and token accuracy, empty where nothing was held out.
        history: the trainer's log, a dict per entry.
        trained: per part, parameters that trained and parameters there are.
        settings: what the run was given.
        cost: time, memory and floating-point operations.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    output_dir: Path
    metrics: dict[str, float]
    history: list[dict[str, float]]
    trained: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    cost: Cost = field(default_factory=Cost)


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
        resume: go on from the last complete checkpoint in `output_dir`.
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
    return _run(
        *(model, captions, processor, Path(output_dir), "projector", None, image_folder, eval_fraction, on_bad_row),
        *(resume, ALIGN | {"plain": plain}, settings),
    )


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
    given: dict[str, Any] = dict(INSTRUCT)
    if "encoder" in train or train == "all":
        given["learning_rates"] = {"encoder": TOWER_RATE}
    if "learning_rate" in settings:
        # a rate of one's own is meant for all parts
        given = {}
    return _run(
        *(model, conversations, processor, Path(output_dir), train, lora, image_folder, eval_fraction, on_bad_row),
        *(resume, given, settings),
    )


def _run(
    model: PreTrainedModel | str | Path,
    rows: object,
    processor: ProcessorMixin | None,
    folder: Path,
    train: Train,
    lora: int | LoraConfig | None,
    image_folder: str | Path | None,
    eval_fraction: float,
    on_bad_row: OnBadRow,
    resume: bool,
    defaults: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> InstructResult:
    if not 0 <= eval_fraction < 1:
        raise SettingsError(f"eval_fraction is {eval_fraction}.", "Give a share of at least 0 and below 1.")
    if on_bad_row not in ("raise", "skip"):
        raise SettingsError(f"on_bad_row is {on_bad_row!r}.", "Choose 'raise' or 'skip'.")
    config = instruct_configuration(defaults, settings, folder, train, eval_fraction > 0, GLOBAL_BATCH)
    described = {
        "train": train,
        "lora": lora if isinstance(lora, int | None) else lora.to_dict(),
        "eval_fraction": eval_fraction,
        "learning_rate": config.learning_rate,
        **defaults,
        **settings,
    }
    keeper = config.process_index == 0
    base = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    if keeper:
        claim(folder, described, resume)
    config.distributed_state.wait_for_everyone()
    model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    planned = plan(adapter, train, lora, config.frozen or ())
    data = load_conversations(rows, image_folder=image_folder)
    held_out = None
    data.verify(on_bad_row, folder / "skipped.jsonl")
    if eval_fraction:
        data, held_out = hold_out(data, eval_fraction, config.seed)
    if held_out is None:
        unwatched(config)
    if keeper:
        write_record(folder, {"finished": False, "settings": described})
    with in_place(adapter, planned, folder) as training:
        set_seed(config.seed)
        trainer = InstructTrainer(model, config, data, held_out, processor, lora, adapter)
        trained = trainer.trained_parameters()
        checkpoint = last_checkpoint(folder) if resume else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = {name: float(value) for name, value in trainer.evaluate().items()} if held_out is not None else {}
        history = trainer.state.log_history
        if isinstance(trainer.model, PeftModel):
            trainer.model.merge_and_unload()
            if keeper:
                model.save_pretrained(folder / MODEL_FOLDER)
        else:
            # gathers what FSDP and DeepSpeed keep in shards
            trainer.save_model(str(folder / MODEL_FOLDER))
            if keeper:
                # a pickle of the settings, which run.json has in words
                (folder / MODEL_FOLDER / "training_args.bin").unlink(missing_ok=True)
        del trainer
    if keeper:
        processor.save_pretrained(folder / MODEL_FOLDER)
        record = {
            "finished": True,
            "settings": described,
            "metrics": metrics,
            "trained": trained,
            "history": history,
            "cost": asdict(training.cost),
            "origin": {"mllm": plain_name(base), "rows": len(data), "versions": versions(), "seed": config.seed},
        }
        write_record(folder, record)
    config.distributed_state.wait_for_everyone()
    return InstructResult(model, processor, folder, metrics, history, trained, described, training.cost)
