"""Generation batches filled up with groups that have spread, after DAPO (arXiv 2503.14476, dynamic sampling).

A group of roll-outs that all score alike has no advantage and gives no gradient. TRL 1.16 counts such groups
("frac_reward_zero_std") and keeps them. Here other questions are asked in their place, and what TRL made of the
batches is put together anew, row by row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

# a row of a batch: of which of the batches, and where in it
Taken = tuple[int, int]


def silent_groups(rewards: torch.Tensor, weights: torch.Tensor, size: int) -> list[bool]:
    """For each group whether its roll-outs all score alike, or at most one of them is judged.

    Args:
        rewards: (n, R) of each roll-out by each reward, NaN where it does not judge.
        weights: (R,).
        size: roll-outs in a group.
    """
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    judged = ~rewards.isnan().all(dim=1)
    groups = zip(total.split(size), judged.split(size), strict=True)
    return [bool((of_group[one] - of_group[one].mean()).abs().sum() < 1e-6) for of_group, one in groups]


def put_together(batches: Sequence[Mapping[str, Any]], taken: Sequence[Taken], pad_token: int) -> dict[str, Any]:
    """Rows of several batches of TRL's as one: prompts padded on the left, completions on the right.

    Args:
        batches: as `_generate_and_score_completions` returns them, without what is about images.
        taken: which rows, in order.
        pad_token: id that pads tokens; all else is padded with 0.
    """
    prompts = [batch["prompt_ids"].shape[1] for batch in batches]
    completions = [batch["completion_ids"].shape[1] for batch in batches]
    one: dict[str, Any] = {}
    for name, value in batches[0].items():
        if value is None or value.ndim == 0:
            one[name] = value
            continue
        values = [batch[name] for batch in batches]
        if value.ndim > 1:
            filler = pad_token if name.endswith("_ids") and not name.endswith("type_ids") else 0
            widths = list(zip(prompts, completions, strict=True))
            values = [
                _widened(tensor, width, (max(prompts), max(completions)), filler, name.startswith("prompt_"))
                for tensor, width in zip(values, widths, strict=True)
            ]
        one[name] = torch.stack([values[batch][row] for batch, row in taken])
    if "num_items_in_batch" in one:
        one["num_items_in_batch"] = one["completion_mask"].sum()
    return one


def _widened(
    tensor: torch.Tensor, width: tuple[int, int], wanted: tuple[int, int], filler: int, of_prompts: bool
) -> torch.Tensor:
    """A (n, L) tensor of prompts, of completions, or of both, at other widths of these."""
    left, right = wanted[0] - width[0], wanted[1] - width[1]
    if of_prompts:
        return pad(tensor, (left, 0), value=filler)
    # no prompt is empty, so that both are wider than completions alone
    return pad(tensor, (left if tensor.shape[1] == sum(width) else 0, right), value=filler)
