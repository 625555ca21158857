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

from pivot_plugin.data.judging import refuse_lacking
from pivot_plugin.errors import DataError
from pivot_plugin.models.image_tokens import ImageTokens, ProcessedImages

from .forest import ROW_PER_TREE, Forest, RowLayout, build_forest
from .image_terms import Shown, View, about_rejected, without_images
from .micro_batches import PARTS, SHARE, runs_that_fit

T = TypeVar("T")
# (pairs,) of a pair's two answers, and (pairs, views) of what is scored beside them
REFERENCE_BESIDE = "ref_beside_logps"
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps", REFERENCE_BESIDE)
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
        beside: how many of the forest's sequences stand behind the pairs' own two each, for terms about pictures.
    """

    forest: Forest
    image_inputs: dict[str, torch.Tensor]
    image_tokens: list[int]
    tree_images: list[list[int]]
    pair_ids: list[str]
    beside: int = 0

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


@dataclass(frozen=True)
class Answer:
    """One answer of a row about some images.

    Attributes:
        tokens: ids of the prompt with its answer.
        start: where the answer begins.
        shown: the image set that it is about, -1 for none.
    """

    tokens: list[int]
    start: int
    shown: int


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
        beside: what is scored beside the two answers of a pair about its own images. Where nothing is, a rejected
            answer is about the row's rejected images, if it has any.
        layout: how trees stand in rows.
        max_nodes: of a part of a batch; None for batches in one part.
        select_images: an adapter's; without it the images of a part are processed anew.
    """

    processor: ProcessorMixin
    image_token_id: int
    shared: SharedPrefix = "images"
    max_length: int | None = None
    whole_prompts: bool | None = None
    beside: tuple[View, ...] = ()
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
                equal images; where there are any, `rejected_images` and `rejected_image_key`.

        Returns:
            `input_ids`, `completion_mask` (S, 1 + C), `attention_mask` (B, N) and `forest` (a `ForestBatch`), and the
            reference log-probabilities where the rows have them. S sequences are two of each pair; what is scored
            beside them stands behind them in the forest alone. A batch that does not fit into `max_nodes` has `parts`
            instead, each like that, with its `share` of the pairs.

        Raises:
            DataError: if `max_length` cuts into a prompt, or images and image tokens of a row disagree.
            ModelError: if the processor cannot be used this way.
        """
        # 1. each row as it is asked about some images, and these, each set once
        views = [self._views(row) for row in rows]
        asked = [{about["image_key"]: about for _, about in of_row} for of_row in views]
        texts = [{key: self.image_tokens.texts(about) for key, about in of_row.items()} for of_row in asked]
        image_sets = {key: about["images"] for of_row in asked for key, about in of_row.items() if about["images"]}
        prompts = {key: text["prompt"] for of_row in texts for key, text in of_row.items()}
        images = self.image_tokens.process_images(list(image_sets.values()), [prompts[key] for key in image_sets])
        number = {key: index for index, key in enumerate(image_sets)}

        # 2. texts, with their images expanded
        answers = []
        for of_row, row_asked, row_texts in zip(views, asked, texts, strict=True):
            tokens = {
                key: self._tokenised(about, row_texts[key], images.expansions_of(number.get(key, -1)))
                for key, about in row_asked.items()
            }
            keys = [about["image_key"] for _, about in of_row]
            answers.append(
                [
                    Answer(tokens[key][1][side], tokens[key][0], number.get(key, -1))
                    for (side, _), key in zip(of_row, keys, strict=True)
                ]
            )

        # 3. what fits together
        runs = self._runs(answers)
        if len(runs) == 1:
            return self._collated(rows, answers, images)
        given = [(image_sets[key], prompts[key]) for key in image_sets]
        return {
            # transformers weights the loss of an evaluated batch by the first length that it finds
            "input_ids": torch.zeros(2 * len(rows), 1, dtype=torch.long),
            PARTS: [
                {
                    **self._collated(rows[run], *self._share_of(answers[run], images, given)),
                    SHARE: (run.stop - run.start) / len(rows),
                }
                for run in runs
            ],
        }

    def _runs(self, answers: Sequence[Sequence[Answer]]) -> list[slice]:
        """Runs of pairs that are computed together."""
        if self.max_nodes is None:
            return [slice(0, len(answers))]
        pairs = [
            [(self._tree(one.tokens, one.start, one.shown, id(one)), one.tokens) for one in of_row]
            for of_row in answers
        ]
        shown = [tuple(one.shown for one in of_row) for of_row in answers]
        return runs_that_fit(pairs, shown, self.max_nodes)

    def _share_of(
        self,
        answers: Sequence[Sequence[Answer]],
        images: ProcessedImages,
        given: Sequence[tuple[Sequence[Any], str]],
    ) -> tuple[list[list[Answer]], ProcessedImages]:
        """A run of pairs, and the images that it shows.

        Args:
            answers: of the run.
            images: of the whole batch, processed.
            given: for each image set of the batch its images as they are, and a prompt that shows them.
        """
        numbers = sorted({one.shown for of_row in answers for one in of_row if one.shown >= 0})
        position = {number: index for index, number in enumerate(numbers)} | {-1: -1}
        of_run = [[replace(one, shown=position[one.shown]) for one in of_row] for of_row in answers]
        if not numbers:
            return of_run, replace(images, inputs={}, counts=[])
        if self.select_images is not None and numbers[-1] - numbers[0] == len(numbers) - 1:
            counts = [images.counts[number] for number in numbers]
            first = sum(len(of_set) for of_set in images.counts[: numbers[0]])
            inputs = self.select_images(images.inputs, first, first + sum(len(of_set) for of_set in counts))
            return of_run, replace(images, inputs=inputs, counts=counts)
        sets = [given[number] for number in numbers]
        return of_run, self.image_tokens.process_images([shown for shown, _ in sets], [prompt for _, prompt in sets])

    def _collated(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Answer]], images: ProcessedImages
    ) -> dict[str, Any]:
        """Pairs that are computed together, as a batch."""
        # 1. trees, what is scored of all rows in the same order
        names = [str(row.get("id")) for row in rows]
        in_order = [of_row[view] for view in range(2 + len(self.beside)) for of_row in answers]
        sets = ImageSets(images.inputs, images.counts, [answer.shown for answer in in_order])
        batch = self.batch_of([a.tokens for a in in_order], [a.start for a in in_order], sets, names)
        batch = replace(batch, beside=len(self.beside) * len(rows))

        # 2. what TRL reads, under its names
        forest = batch.forest
        of_pairs = forest.edge_of[: 2 * len(rows)]
        # one column in front stands for the last prompt token: TRL shifts by one
        mask = torch.nn.functional.pad((of_pairs >= 0).long(), (1, 0))
        ids = torch.nn.functional.pad(forest.edge_token[of_pairs.clamp(min=0)], (1, 0)) * mask
        references = {name: torch.tensor([row[name] for row in rows]) for name in REFERENCES if name in rows[0]}
        return {
            "input_ids": ids,
            "completion_mask": mask,
            "attention_mask": forest.is_node.long(),
            "forest": batch,
            **references,
        }

    def _views(self, row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        """What is scored of a row: each time which answer, and the row as it is asked about some images."""
        if self.beside:
            refuse_lacking(row["image_key"], row.get("rejected_image_key", ""), f"Row {row.get('id')!r}")
        own = [(side, shown_by(row, side, self.beside)) for side in ("chosen", "rejected")]
        return [*own, *((view.answer, shown_as(row, view.shown)) for view in self.beside)]

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
    ) -> tuple[int, dict[str, list[int]]]:
        """Where a row's answers begin, and its chosen and its rejected sequence."""
        prompt = self.image_tokens.prompt(row, texts["prompt"], expansions)
        if self.max_length is not None and len(prompt) >= self.max_length:
            raise DataError(
                f"The prompt of pair {row.get('id')!r} has {len(prompt)} tokens with its images, which leaves "
                f"nothing of its answers within max_length={self.max_length}.",
                "Raise max_length, or set it to None to cut nothing.",
            )
        return len(prompt), {
            side: (prompt + self.image_tokens.tokens(texts[side]))[: self.max_length] for side in ("chosen", "rejected")
        }


def shown_as(row: Mapping[str, Any], shown: Shown) -> Mapping[str, Any]:
    """A row asked about its images, about its rejected ones, or about nothing."""
    if shown == "nothing":
        return without_images(row)
    return about_rejected(row) if shown == "rejected_images" else row


def shown_by(row: Mapping[str, Any], side: str, beside: Sequence[View] = ()) -> Mapping[str, Any]:
    """A row as one of a pair's own two answers is about it.

    Args:
        row: in the normal form.
        side: "chosen" or "rejected".
        beside: as for `ForestCollator`.
    """
    apart = side == "rejected" and not beside and row.get("rejected_image_key")
    return shown_as(row, "rejected_images" if apart else "images")
