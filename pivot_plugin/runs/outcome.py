"""From what was measured of a run to its verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pivot_plugin.data.conversations import ConversationDataset
from pivot_plugin.data.questions import QuestionDataset
from pivot_plugin.data.rows import RowDataset
from pivot_plugin.probes.scores import difference, score_of
from pivot_plugin.training.looks import Look
from pivot_plugin.verdict import Change, Verdict

from .run import Run


def judged(
    run: Run,
    looks: tuple[Sequence[Look], Sequence[Look | None]],
    history: Sequence[Mapping[str, Any]],
    planned: int,
    moved: bool,
) -> Verdict:
    """The verdict on a run.

    Args:
        run: trained.
        looks: at the held-out rows before and after, and at them without their pictures; empty where none are held out.
        history: the trainer's log.
        planned: optimiser steps that the run would have taken undisturbed.
        moved: whether any weight has changed.
    """
    seen, blind = looks
    told: dict[str, Any] = {}
    if len(seen) == 2:
        told = {
            "measure": seen[0].measure,
            "rows_are": _named(run.held_out),
            "chance": seen[0].chance,
            "change": _change(seen[0], seen[1]),
        }
        if len(blind) == 2 and blind[0] is not None and blind[1] is not None:
            told["blind"] = _change(blind[0], blind[1])
    # alignment and instruction, which may do without pictures
    of_encoder = not isinstance(run.rows, ConversationDataset)
    kept = _last(history, "watch/best_step")
    return Verdict(
        **told,
        moved=moved,
        taken=int(max((entry.get("step", 0) for entry in history), default=0)),
        planned=planned,
        kept=None if kept is None or not run.config.load_best_model_at_end else int(kept),
        stopped_early=_last(history, "watch/stopped_early_at") is not None,
        without_image=without_image(run.rows) if of_encoder else (0, 0),
        subject="encoder" if of_encoder else "model",
        lower_is_better=not of_encoder,
    )


def without_image(rows: object) -> tuple[int, int]:
    """How many rows show no picture, and how many there are; (0, 0) of a stream, which is not counted."""
    if not isinstance(rows, RowDataset):
        return 0, 0
    return sum(not key for key in rows.image_keys.tolist()), len(rows)


def _named(rows: object) -> str:
    kinds = {QuestionDataset: "questions", ConversationDataset: "conversations"}
    return next((name for kind, name in kinds.items() if isinstance(rows, kind)), "pairs")


@torch.no_grad()
def has_moved(model: nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether any weight is another than before; of a model whose weights are elsewhere it is taken for granted.

    Args:
        model: trained.
        before: copies of its weights, by name.
    """
    parameters = dict(model.named_parameters())
    return any(
        name not in parameters
        or parameters[name].is_meta
        or not torch.equal(parameters[name].detach().to(weight.device, weight.dtype), weight)
        for name, weight in before.items()
    )


def _change(before: Look, after: Look) -> Change:
    first, second = score_of(before.rows), score_of(after.rows)
    gap = difference(first, second)
    low, high, p = (gap.value if gap.low is None else gap.low), (gap.value if gap.high is None else gap.high), gap.p
    return Change(first.value, second.value, low, high, 1.0 if p is None else p, len(before.rows))


def _last(history: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((entry[name] for entry in reversed(history) if name in entry), None)
