"""From preference rows to one batch: images processed once per image set, token sequences grown into a forest.

The collator leaves TRL's loss code its own names: `input_ids` and `completion_mask` hold the completions (one column
for the last prompt token in front), which is all that TRL's losses and metrics look at; the forest beside them holds
what the model computes.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeVar, cast

import torch
from transformers import ProcessorMixin

from pivot_plugin.errors import DataError
from pivot_plugin.models.image_tokens import ImageTokens, ProcessedImages

from .forest import ROW_PER_TREE, Forest, RowLayout, build_forest
from .micro_batches import PARTS, SHARE, runs_that_fit

T = TypeVar("T")
SharedPrefix = Literal["images", "prompt", "all"]


@dataclass(frozen=True)
class ForestBatch:
    """What one forward pass over a forest needs.

    Attributes:
        forest: the token trees.
        image_inputs: processor outputs about the distinct images of the batch, such as pixel_values.
        image_tokens: number of image tokens of each distinct image, in the order of `image_inputs`.
        tree_images: for each tree, the distinct images its image tokens stand for, in order.
        pair_ids: names of the pairs, for errors.
    """

    forest: Forest
    image_inputs: dict[str, torch.Tensor]
    image_tokens: list[int]
    tree_images: list[list[int]]
    pair_ids: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ForestBatch":
        """The same batch with every tensor on another device."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ForestBatch":
        """The same batch in host memory that a GPU copies from while it computes; data loaders ask for it."""
        return _each_tensor(self, torch.Tensor.pin_memory)


def _each_tensor(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    if isinstance(value, torch.Tensor):
        return cast(T, change(value))
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return cast(T, [_each_tensor(item, change) for item in value])
    if isinstance(value, dict):
        return cast(T, {key: _each_tensor(item, change) for key, item in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        # paths and counts are read on the host only
        moved = {
            field.name: _each_tensor(getattr(value, field.name), change)
            for field in fields(value)
            if field.name != "paths"
        }
        return cast(T, replace(value, **moved))
    return value


@dataclass(frozen=True)
class ImageSets:
    """The image sets of a batch, and which sequence shows which.

    Attributes:
        inputs: processor outputs about the images of all sets, one set after the other.
        tokens: for each set the number of image tokens of each of its images.
        shown: for each sequence the set it shows, -1 for none.
    """

    inputs: dict[str, torch.Tensor]
    tokens: list[list[int]]
    shown: list[int]


@dataclass
class ForestCollator:
    """Turns preference rows into a batch for `PivotTrainer`.

    Args:
        processor: the model's own processor.
        image_token_id: the token that stands for one image feature.
        shared: what the sequences of a tree must have in common: "images", all tokens up to the last of an image;
            the whole "prompt"; or "all", so that each sequence has a row of its own, with images still processed once.
        max_length: cut sequences to this many tokens, as TRL does; None never cuts.
        whole_prompts: as for `ImageTokens`.
        layout: how trees stand in rows.
        max_nodes: of a part of a batch; None for batches in one part.
        select_images: an adapter's; without it the images of a part are processed anew.
    """

    processor: ProcessorMixin
    image_token_id: int
    shared: SharedPrefix = "images"
    max_length: int | None = None
    whole_prompts: bool | None = None
    layout: RowLayout = ROW_PER_TREE
    max_nodes: int | None = None
    select_images: Callable[[Mapping[str, torch.Tensor], int, int], dict[str, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        self.image_tokens = ImageTokens(self.processor, self.image_token_id, self.whole_prompts)

    def __getstate__(self) -> dict[str, Any]:
        # an adapter knows its model, which no worker needs
        return {**self.__dict__, "select_images": None}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate pairs, chosen sequences first.

        Args:
            rows: with `images` (PIL), `prompt`, `chosen`, `rejected` (messages) and `image_key`, equal for rows with
                equal images.

        Returns:
            `input_ids`, `completion_mask` (S, 1 + C), `attention_mask` (B, N) and `forest` (a `ForestBatch`), and the
            reference log-probabilities where the rows have them. A batch that does not fit into `max_nodes` has `parts`
            instead, each like that, with its `share` of the pairs.

        Raises:
            DataError: if `max_length` cuts into a prompt, or images and image tokens of a row disagree.
            ModelError: if the processor cannot be used this way.
        """
        # 1. images, each set once
        texts = [self.image_tokens.texts(row) for row in rows]
        image_sets = {row["image_key"]: row["images"] for row in rows if row["images"]}
        prompts = {row["image_key"]: text["prompt"] for row, text in zip(rows, texts, strict=True)}
        images = self.image_tokens.process_images(list(image_sets.values()), [prompts[key] for key in image_sets])
        number = {key: index for index, key in enumerate(image_sets)}
        shown = [number[row["image_key"]] if row["images"] else -1 for row in rows]

        # 2. texts, with their images expanded
        answers = []
        for row, text, index in zip(rows, texts, shown, strict=True):
            answers.append(self._tokenised(row, text, images.expansions_of(index)))

        # 3. what fits together
        whole = ImageSets(images.inputs, images.counts, shown)
        runs = self._runs(answers, shown)
        if len(runs) == 1:
            return self._collated(rows, answers, whole)
        return {
            # transformers weights the loss of an evaluated batch by the first length that it finds
            "input_ids": torch.zeros(2 * len(rows), 1, dtype=torch.long),
            PARTS: [
                {
                    **self._collated(rows[run], answers[run], self._share_of(whole, run, rows, prompts)),
                    SHARE: (run.stop - run.start) / len(rows),
                }
                for run in runs
            ],
        }

    def _runs(self, answers: Sequence[tuple[int, list[list[int]]]], shown: Sequence[int]) -> list[slice]:
        """Runs of pairs that are computed together."""
        if self.max_nodes is None:
            return [slice(0, len(answers))]
        pairs = [
            [(self._tree(sequence, start, image_set, (pair, side)), sequence) for side, sequence in enumerate(sides)]
            for pair, ((start, sides), image_set) in enumerate(zip(answers, shown, strict=True))
        ]
        return runs_that_fit(pairs, shown, self.max_nodes)

    def _share_of(
        self, image_sets: ImageSets, run: slice, rows: Sequence[Mapping[str, Any]], prompts: Mapping[Any, str]
    ) -> ImageSets:
        """The image sets of a run of pairs."""
        shown = image_sets.shown[run]
        numbers = sorted({number for number in shown if number >= 0})
        position = {number: index for index, number in enumerate(numbers)} | {-1: -1}
        tokens, of_run = [image_sets.tokens[number] for number in numbers], [position[number] for number in shown]
        if not numbers:
            return ImageSets({}, [], of_run)
        if self.select_images is not None and numbers[-1] - numbers[0] == len(numbers) - 1:
            first = sum(len(counts) for counts in image_sets.tokens[: numbers[0]])
            count = sum(len(counts) for counts in tokens)
            return ImageSets(self.select_images(image_sets.inputs, first, first + count), tokens, of_run)
        of_number = dict(zip(shown, rows[run], strict=True))
        of_sets = [of_number[number] for number in numbers]
        images = self.image_tokens.process_images(
            [row["images"] for row in of_sets], [prompts[row["image_key"]] for row in of_sets]
        )
        return ImageSets(images.inputs, images.counts, of_run)

    def _collated(
        self,
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[tuple[int, list[list[int]]]],
        image_sets: ImageSets,
    ) -> dict[str, Any]:
        """Pairs that are computed together, as a batch."""
        sequences = [sides[side] for side in (0, 1) for _, sides in answers]
        starts = [start for start, _ in answers] * 2

        # 1. trees
        names = [str(row.get("id")) for row in rows]
        batch = self.batch_of(sequences, starts, replace(image_sets, shown=image_sets.shown * 2), names)

        # 2. what TRL reads, under its names
        forest = batch.forest
        # one column in front stands for the last prompt token: TRL shifts by one
        mask = torch.nn.functional.pad((forest.edge_of >= 0).long(), (1, 0))
        ids = torch.nn.functional.pad(forest.edge_token[forest.edge_of.clamp(min=0)], (1, 0)) * mask
        references = {
            name: torch.tensor([row[name] for row in rows])
            for name in ("ref_chosen_logps", "ref_rejected_logps")
            if name in rows[0]
        }
        return {
            "input_ids": ids,
            "completion_mask": mask,
            "attention_mask": forest.is_node.long(),
            "forest": batch,
            **references,
        }

    def check(self, row: Mapping[str, Any], images: ProcessedImages) -> None:
        """Make sure that a pair can be turned into tokens.

        Args:
            row: with `images` (PIL), `prompt`, `chosen`, `rejected`.
            images: of the row, processed.

        Raises:
            DataError: as a call.
        """
        self._tokenised(row, self.image_tokens.texts(row), images.expansions_of(0 if row["images"] else -1))

    def batch_of(
        self, sequences: Sequence[list[int]], starts: Sequence[int], image_sets: ImageSets, names: list[str]
    ) -> ForestBatch:
        """The forest of some sequences.

        Image tokens are filled with image features in order, so that sequences share a tree only if they agree up to
        and including their last image token.

        Args:
            sequences: token ids of prompts with their completions.
            starts: for each sequence, where its completion begins.
            image_sets: what the sequences show.
            names: of the rows, for errors.
        """
        groups: dict[object, list[int]] = {}
        for index, (sequence, shown) in enumerate(zip(sequences, image_sets.shown, strict=True)):
            groups.setdefault(self._tree(sequence, starts[index], shown, index), []).append(index)
        first = [0, *accumulate(len(counts) for counts in image_sets.tokens)]
        images_of = [list(range(start, end)) for start, end in pairwise(first)]
        shown_by_group = [image_sets.shown[group[0]] for group in groups.values()]
        return ForestBatch(
            build_forest(list(groups.values()), sequences, starts, self.layout),
            image_sets.inputs,
            [count for counts in image_sets.tokens for count in counts],
            [images_of[shown] if shown >= 0 else [] for shown in shown_by_group],
            names,
        )

    def _tree(self, sequence: Sequence[int], start: int, shown: int, name: Hashable) -> Hashable:
        """A key that is equal for sequences that share a tree.

        Args:
            sequence: token ids.
            start: where its completion begins.
            shown: the image set that it shows.
            name: of the sequence alone.
        """
        if self.shared == "all":
            return name
        if self.shared == "images":
            start = 1 + max((i for i, token in enumerate(sequence) if token == self.image_token_id), default=-1)
        return shown, tuple(sequence[:start])

    def _tokenised(
        self, row: Mapping[str, Any], texts: Mapping[str, str], expansions: list[list[int]] | None
    ) -> tuple[int, list[list[int]]]:
        """Where a row's answers begin, and its chosen and its rejected sequence."""
        prompt = self.image_tokens.prompt(row, texts["prompt"], expansions)
        if self.max_length is not None and len(prompt) >= self.max_length:
            raise DataError(
                f"The prompt of pair {row.get('id')!r} has {len(prompt)} tokens with its images, which leaves "
                f"nothing of its answers within max_length={self.max_length}.",
                "Raise max_length, or set it to None to cut nothing.",
            )
        return len(prompt), [
            (prompt + self.image_tokens.tokens(texts[side]))[: self.max_length] for side in ("chosen", "rejected")
        ]
