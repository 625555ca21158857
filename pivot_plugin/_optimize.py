"""The one verb: a model and preference pairs in, the model with a better vision encoder out."""

import difflib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.config import PivotConfig, Train
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import DataError, ModelError, PivotError, SettingsError, TrainingError
from pivot_plugin.hooks import notify
from pivot_plugin.objectives import resolve
from pivot_plugin.preferences import OnBadRow, PairDataset, PairStream, hold_out, load
from pivot_plugin.training.parts import plan, restored_on_failure, trainable_weights, weight_change
from pivot_plugin.training.tower import check_processor, find_adapter
from pivot_plugin.training.trainer import PivotTrainer

logger = logging.getLogger(__name__)

# for LoRA: cautious beside the 1e-3 that serves the embedded world of the demonstration best
LORA_LEARNING_RATE = 2e-4
# for the weights themselves: arXiv 2510.16333, appendix E.1, stage 2
LEARNING_RATE = 1e-6
SFT_LEARNING_RATE = 5e-6
RUN_FILE = "run.json"


@dataclass
class PivotResult:
    """A finished run.

    Attributes:
        model: the MLLM with the trained tower, LoRA merged.
        processor: the one it was trained with.
        output_dir: the run's folder.
        metrics: "before" and "after", each with preference_accuracy, margin, logps_chosen, logps_rejected on the
            held-out pairs; empty where none were held out.
        history: the trainer's log, a dict per entry.
        weight_change: relative change of the tower's weights, per block.
        trained: per part, parameters that trained and parameters there are.
        settings: what the run was given.
        adapter: of the model's family.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    output_dir: Path
    metrics: dict[str, dict[str, float]]
    history: list[dict[str, float]]
    weight_change: dict[str, float]
    trained: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    adapter: VisionAdapter
    _encoder: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self.adapter.family

    @property
    def encoder(self) -> PreTrainedModel:
        """The trained tower as a stand-alone transformers model; a copy, made once."""
        if self._encoder is None:
            self._encoder = self.adapter.extract()
        return self._encoder

    def save(self, folder: str | Path) -> Path:
        """Write the encoder with its projector, provenance and card.

        Args:
            folder: to write; replaced as a whole if it holds an encoder already.

        Raises:
            EncoderError: if the folder holds something else, or cannot be written.
        """
        record = {"metrics": self.metrics, "settings": self.settings, "weight_change": self.weight_change}
        return save_encoder(self.adapter, self.processor, folder, record)


@dataclass(frozen=True)
class _Run:
    """What plugins are told of a run that starts."""

    family: str
    output_dir: Path
    settings: dict[str, Any]


def optimize(
    model: PreTrainedModel | str | Path,
    prefs: object,
    *,
    processor: ProcessorMixin | None = None,
    eval_prefs: object | None = None,
    output_dir: str | Path = "pivot-run",
    objective: str | Sequence[str] = "dpo",
    train: Train = "encoder",
    lora: int | LoraConfig | None = 16,
    eval_fraction: float = 0.02,
    on_bad_row: OnBadRow = "raise",
    resume: bool = False,
    **settings: Any,
) -> PivotResult:
    """Make the vision encoder of an MLLM better by preference optimisation.

    Args:
        model: a loaded transformers MLLM, or the path or Hub id of one. A loaded one is trained in place; after a
            failure it is as it was.
        prefs: preference pairs in any form that `pivot_plugin.preferences.load` takes: a list of dicts, a
            `datasets.Dataset`, a file or folder, a Hub id, a stream (then with `max_steps`), or what `load` returned.
        processor: the model's; found by the model's `name_or_path` where not given.
        eval_prefs: held-out pairs, in the same forms.
        output_dir: folder of the run: checkpoints, log, encoder.
        objective: "dpo", "mpo", "specs", "sft", any other name a plugin offers, a TRL loss type, or a list of those
            (weighted by `loss_weights=`).
        train: "encoder" (the tower), "encoder+projector", or "all".
        lora: a LoRA rank, a peft config, or None to train the weights themselves.
        eval_fraction: share of the pairs to hold out where `eval_prefs` is not given (at least 32 and at most 1000, at
            most a quarter of all); 0 holds none out.
        on_bad_row: "raise" stops at the first pair that cannot be used, before training; "skip" leaves such pairs out
            and lists them in `skipped.jsonl` in `output_dir`.
        resume: go on from the last complete checkpoint in `output_dir`.
        **settings: any field of `PivotConfig`, which has all of TRL's DPOConfig: `learning_rate`, `max_steps`,
            `per_device_train_batch_size` (in pairs), `beta`, `loss_type`, `use_cpu`, ...

    Returns:
        The trained model, its encoder, and what was measured.

    Raises:
        SettingsError: for an option that does not exist or cannot be used, before anything is loaded.
        DataError, ModelError: for pairs or a model that cannot be used, before training.
        TrainingError: if training goes wrong; checkpoints stay in `output_dir`.

    Source:
        arXiv 2510.16333, section 3.1, stage 2.
    """
    folder = Path(output_dir)
    config = _config(settings, folder, objective, train, lora)
    if not 0 <= eval_fraction < 1:
        raise SettingsError(f"eval_fraction is {eval_fraction}.", "Give a share of at least 0 and below 1.")
    described = {
        "objective": objective,
        "train": train,
        "lora": lora if isinstance(lora, int | None) else lora.to_dict(),
        "eval_fraction": eval_fraction,
        "learning_rate": config.learning_rate,
        **settings,
    }
    # of several processes one keeps the folder
    keeper = config.process_index == 0
    if keeper:
        _claim(folder, described, resume)
    config.distributed_state.wait_for_everyone()
    model, processor = load_model(model, processor)
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    plan(adapter, train, lora)
    pairs = load(prefs, on_bad_row=on_bad_row, skipped=folder / "skipped.jsonl")
    held_out = (
        None
        if eval_prefs is None
        else load(eval_prefs, on_bad_row=on_bad_row, skipped=folder / "skipped-eval.jsonl", name="eval_prefs")
    )
    for data in (pairs, held_out):
        if isinstance(data, PairDataset):
            data.verify()
    if isinstance(pairs, PairStream) and config.max_steps <= 0:
        raise SettingsError("A stream of pairs has no length.", "Give max_steps=, the number of optimiser steps.")
    if held_out is None and isinstance(pairs, PairDataset):
        pairs, held_out = hold_out(pairs, eval_fraction, config.seed)
    if isinstance(held_out, PairStream):
        raise DataError("eval_prefs is a stream.", "Give held-out pairs as a list or a datasets.Dataset.")
    if keeper:
        (folder / RUN_FILE).write_text(json.dumps({"finished": False, "settings": described}, indent=2, default=str))
        notify("pivot_run_started", run=_Run(adapter.family, folder, described))
    result = _train(model, processor, adapter, config, pairs, held_out, lora, resume, described)
    if keeper:
        result.save(folder / "encoder")
        record = {
            "finished": True,
            "settings": described,
            "metrics": result.metrics,
            "weight_change": result.weight_change,
            "trained": result.trained,
            "history": result.history,
        }
        (folder / RUN_FILE).write_text(json.dumps(record, indent=2, default=str))
        notify("pivot_run_finished", result=result)
    config.distributed_state.wait_for_everyone()
    return result


def _train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    adapter: VisionAdapter,
    config: PivotConfig,
    pairs: PairDataset | PairStream,
    held_out: PairDataset | None,
    lora: int | LoraConfig | None,
    resume: bool,
    described: dict[str, Any],
) -> PivotResult:
    """Train in place; on any failure, a keyboard interrupt included, put the model back as it was."""
    planned = plan(adapter, config.train, lora)
    before = trainable_weights(adapter, planned)
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with restored_on_failure(model):
            set_seed(config.seed)
            trainer = PivotTrainer(
                model=model,
                args=config,
                train_dataset=pairs,
                eval_dataset=held_out,
                processing_class=processor,
                lora=lora,
                adapter=adapter,
            )
            trained = trainer.trained_parameters()
            metrics = {}
            if held_out is not None:
                # before the first step the policy is the reference
                metrics["before"] = trainer.reference_scores().metrics()
            checkpoint = last_checkpoint(Path(config.output_dir or ".")) if resume else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if held_out is not None:
                metrics["after"] = trainer.score(held_out).metrics()
            history = trainer.state.log_history
            if isinstance(trainer.model, PeftModel):
                trainer.model.merge_and_unload()
            del trainer
    except BaseException as error:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in before.items():
                own[name].copy_(weight)
        if isinstance(error, PivotError):
            raise
        found = last_checkpoint(Path(config.output_dir or "."))
        kept = f"Checkpoint {found} is kept; go on with resume=True." if found else "There is no checkpoint yet."
        if isinstance(error, KeyboardInterrupt):
            logger.warning("Interrupted. The model is as it was. %s", kept)
            raise
        raise TrainingError(f"Training stopped with {type(error).__name__}: {error}.", kept) from error
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
    model.eval()
    return PivotResult(
        model=model,
        processor=processor,
        output_dir=Path(config.output_dir or "."),
        metrics=metrics,
        history=history,
        weight_change=weight_change(adapter, before),
        trained=trained,
        settings=described,
        adapter=adapter,
    )


def _config(
    settings: dict[str, Any],
    folder: Path,
    objective: str | Sequence[str],
    train: Train,
    lora: int | LoraConfig | None,
) -> PivotConfig:
    known = {field.name for field in fields(PivotConfig)}
    if unknown := [name for name in settings if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See PivotConfig, which has all of TRL's DPOConfig."
        raise SettingsError(f"optimize has no option {unknown[0]!r}.", hint)
    preset = resolve(objective)
    if "loss_type" in settings and objective != "dpo":
        raise SettingsError(
            f"Both objective={objective!r} and loss_type={settings['loss_type']!r} are given.", "Give one of them."
        )
    rate = LORA_LEARNING_RATE if lora is not None else SFT_LEARNING_RATE if objective == "sft" else LEARNING_RATE
    settings = {"learning_rate": rate, **preset, **settings}
    try:
        return PivotConfig(output_dir=str(folder), train=train, **settings)
    except PivotError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"The settings cannot be used: {error}", "Change the option it names.") from error


def _claim(folder: Path, described: dict[str, Any], resume: bool) -> None:
    """Make sure of a folder that can be written and holds no other run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}.", "Choose another output_dir."
        ) from error
    earlier = folder / RUN_FILE
    if not earlier.exists():
        return
    if not resume:
        raise SettingsError(
            f"output_dir {str(folder)!r} holds an earlier run.",
            "Choose another output_dir, delete this one, or go on with it by resume=True (--resume).",
        )
    was = json.loads(earlier.read_text()).get("settings", {})
    now = json.loads(json.dumps(described, default=str))
    if differing := sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        name = differing[0]
        raise SettingsError(
            f"The run in {str(folder)!r} had {name}={was.get(name)!r}, now it is {now.get(name)!r}.",
            "Resume with the same settings, or choose another output_dir.",
        )


def load_model(
    model: PreTrainedModel | str | Path, processor: ProcessorMixin | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An MLLM and its processor, loaded where they are not.

    Args:
        model: loaded, or a folder or Hub id.
        processor: found by the model's name where None.

    Raises:
        ModelError: if either cannot be loaded.
    """
    name = model
    if isinstance(model, str | Path):
        try:
            model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"No MLLM could be loaded from {str(name)!r}: {error}",
                "Give a folder or Hub id of an image-text model.",
            ) from error
    elif isinstance(model, PreTrainedModel):
        name = model.name_or_path
    if processor is not None:
        return model, processor
    if not name or not isinstance(name, str | Path):
        raise ModelError(
            f"No processor was given, and this {type(model).__name__} has no name_or_path to find one by.",
            "Pass processor=AutoProcessor.from_pretrained(...).",
        )
    try:
        return model, AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No processor could be loaded from {str(name)!r}: {error}", "Pass processor= explicitly."
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; one that was being written when the run was killed does not count.

    Args:
        folder: of the run.
    """
    complete = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            # the trainer writes this file last
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        complete[int(step)] = checkpoint
    return complete[max(complete)] if complete else None
