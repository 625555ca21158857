"""What trackers are shown beside numbers: the table of what trains, and pictures of where the loss looks.

transformers' callbacks hold the trackers themselves, each under a name and with an interface of its own. They stand
here and nowhere else; a tracker that is not named here gets numbers alone.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

logger = logging.getLogger(__name__)

WHAT_TRAINS = "pivot/what trains"
SALIENCY_SHEET = "pivot/saliency"


class WhatTrains(TrainerCallback):
    """Shows trackers the table of what trains, when training begins; to be added behind them, which begin then too.

    Args:
        trainer: with a `parameter_table`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            table = self._trainer.parameter_table()
            show_text(self._trainer.callback_handler.callbacks, WHAT_TRAINS, table, state.global_step)


def show_text(callbacks: Sequence[TrainerCallback], name: str, text: str, step: int) -> None:
    """Give a text, whose lines stay as they are, to every tracker that takes texts.

    Args:
        callbacks: of a trainer; those that are no tracker are left alone.
        name: under which trackers show it.
        text: of some lines.
        step: optimiser steps taken.
    """
    _show(callbacks, name, step, _TEXTS, text)


def show_picture(callbacks: Sequence[TrainerCallback], name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to every tracker that takes pictures.

    Args:
        callbacks: of a trainer; those that are no tracker are left alone.
        name: under which trackers show it.
        picture: in RGB.
        step: optimiser steps taken.
    """
    _show(callbacks, name, step, _PICTURES, picture)


def takes_pictures(callbacks: Sequence[TrainerCallback]) -> bool:
    """Whether any of a trainer's callbacks is a tracker that takes pictures."""
    return any(type(callback).__name__ in _PICTURES for callback in callbacks)


def _show(
    callbacks: Sequence[TrainerCallback], name: str, step: int, ways: dict[str, tuple[str, Any]], shown: object
) -> None:
    for callback in callbacks:
        attribute, way = ways.get(type(callback).__name__, ("", None))
        tracker = getattr(callback, attribute, None) if attribute else None
        if tracker is None:
            continue
        try:
            way(tracker, name, shown, step)
        # of a service that others run: what is shown there is no reason to end a run
        except Exception as error:
            logger.warning("%s did not take %r: %s: %s", type(callback).__name__, name, type(error).__name__, error)


def _text_of_tensorboard(writer: Any, name: str, text: str, step: int) -> None:
    # it reads Markdown, in which indented lines are code
    writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)


def _picture_of_tensorboard(writer: Any, name: str, picture: Image.Image, step: int) -> None:
    writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


def _text_of_wandb(wandb: Any, name: str, text: str, step: int) -> None:
    rows = [[line] for line in text.splitlines()]
    wandb.log({name: wandb.Table(columns=[name], data=rows), "train/global_step": step})


def _picture_of_wandb(wandb: Any, name: str, picture: Image.Image, step: int) -> None:
    wandb.log({name: wandb.Image(picture), "train/global_step": step})


def _text_of_trackio(trackio: Any, name: str, text: str, step: int) -> None:
    trackio.log({name: trackio.Markdown(f"```\n{text}\n```"), "train/global_step": step})


def _picture_of_trackio(trackio: Any, name: str, picture: Image.Image, step: int) -> None:
    trackio.log({name: trackio.Image(np.asarray(picture.convert("RGB"))), "train/global_step": step})


def _text_of_mlflow(mlflow: Any, name: str, text: str, step: int) -> None:
    mlflow.log_text(text, f"{name}.txt")


def _picture_of_mlflow(mlflow: Any, name: str, picture: Image.Image, step: int) -> None:
    mlflow.log_image(picture, f"{name}-{step}.png")


# by the class of transformers' callback: the attribute that holds the tracker, and how that is told
_TEXTS: dict[str, tuple[str, Any]] = {
    "TensorBoardCallback": ("tb_writer", _text_of_tensorboard),
    "WandbCallback": ("_wandb", _text_of_wandb),
    "TrackioCallback": ("_trackio", _text_of_trackio),
    "MLflowCallback": ("_ml_flow", _text_of_mlflow),
}
_PICTURES: dict[str, tuple[str, Any]] = {
    "TensorBoardCallback": ("tb_writer", _picture_of_tensorboard),
    "WandbCallback": ("_wandb", _picture_of_wandb),
    "TrackioCallback": ("_trackio", _picture_of_trackio),
    "MLflowCallback": ("_ml_flow", _picture_of_mlflow),
}
