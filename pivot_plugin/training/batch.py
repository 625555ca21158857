"""From preference rows to one batch: images processed once per image set, token sequences grown into a forest.

The collator leaves TRL's loss code its own names: `input_ids` and `completion_mask` hold the completions (one column
for the last prompt token in front), which is all that TRL's losses and metrics look at; the forest beside them holds
what the model computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from pivot_plugin.errors import DataError, ModelError

from .forest import Forest, build_forest

T = TypeVar("T")


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
        return _moved(self, device, non_blocking)


def _moved(value: T, device: torch.device | str, non_blocking: bool) -> T:
    if isinstance(value, torch.Tensor):
        return cast(T, value.to(device, non_blocking=non_blocking))
    if isinstance(value, dict):
        return cast(T, {key: _moved(item, device, non_blocking) for key, item in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        # paths and counts are read on the host only
        moved = {
            field.name: _moved(getattr(value, field.name), device, non_blocking)
            for field in fields(value)
            if field.name != "paths"
        }
        return cast(T, replace(value, **moved))
    return value


@dataclass
class ForestCollator:
    """Turns preference rows into a batch for `PivotTrainer`.

    Args:
        processor: the model's own processor.
        image_token_id: the token that stands for one image feature.
        tree: whether sequences may share a row; otherwise each has its own, with images still processed once.
        max_length: cut sequences to this many tokens, as TRL does; None never cuts.
    """

    processor: ProcessorMixin
    image_token_id: int
    tree: bool = True
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate pairs, chosen sequences first.

        Args:
            rows: with `images` (PIL), `prompt`, `chosen`, `rejected` (messages) and `image_key`, equal for rows with
                equal images.

        Returns:
            `input_ids`, `completion_mask` (S, 1 + C), `attention_mask` (B, N) and `forest` (a `ForestBatch`), and the
            reference log-probabilities where the rows have them.

        Raises:
            DataError: if `max_length` cuts into a prompt, or images and image tokens of a row disagree.
            ModelError: if the processor cannot be used this way.
        """
        image_sets = {row["image_key"]: row["images"] for row in rows if row["images"]}
        image_inputs, expansions = self.process_images(list(image_sets.values()))
        expansion_of = dict(zip(image_sets, expansions, strict=True))
        first_image = {}
        image_tokens: list[int] = []
        for key, parts in expansion_of.items():
            first_image[key] = len(image_tokens)
            image_tokens += [part.count(self.image_token_id) for part in parts]

        texts = [self._texts(row) for row in rows]
        sequences, starts = [], []
        for side in ("chosen", "rejected"):
            for row, text in zip(rows, texts, strict=True):
                prompt = self.expand(row, self.tokens(text["prompt"]), expansion_of.get(row["image_key"], []))
                completion = self.tokens(text[side])
                if self.max_length is not None and len(prompt) >= self.max_length:
                    raise DataError(
                        f"The prompt of pair {row.get('id')!r} has {len(prompt)} tokens with its images, which leaves "
                        f"nothing of its answers within max_length={self.max_length}.",
                        "Raise max_length, or set it to None to cut nothing.",
                    )
                sequences.append((prompt + completion)[: self.max_length])
                starts.append(len(prompt))

        groups: dict[object, list[int]] = {}
        for index, (sequence, row) in enumerate(zip(sequences, [*rows, *rows], strict=True)):
            group = self.group(index, sequence, row["image_key"] if row["images"] else None)
            groups.setdefault(group, []).append(index)
        forest = build_forest(list(groups.values()), sequences, starts)
        tree_images = []
        for group in groups.values():
            row = rows[group[0] % len(rows)]
            first = first_image.get(row["image_key"], 0)
            tree_images.append(list(range(first, first + len(row["images"]))))
        # one column in front stands for the last prompt token: TRL shifts by one
        mask = torch.nn.functional.pad((forest.edge_of >= 0).long(), (1, 0))
        ids = torch.nn.functional.pad(forest.edge_token[forest.edge_of.clamp(min=0)], (1, 0)) * mask
        batch: dict[str, Any] = {
            "input_ids": ids,
            "completion_mask": mask,
            "attention_mask": forest.is_node.long(),
            "forest": ForestBatch(
                forest, image_inputs, image_tokens, tree_images, [str(row.get("id")) for row in rows]
            ),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def group(self, index: int, sequence: list[int], images: object) -> object:
        """Which tree a sequence belongs to, as a key.

        Image tokens are filled with image features in order, so that sequences may share a tree only if they agree up
        to and including their last image token.

        Args:
            index: of the sequence.
            sequence: its tokens.
            images: tells its image set from others, None where it has none.
        """
        if not self.tree:
            return index
        last = max((i for i, token in enumerate(sequence) if token == self.image_token_id), default=-1)
        return images, tuple(sequence[: last + 1])

    def _texts(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The row in the words of the chat template, by TRL's own functions."""
        messages = {
            "prompt": prepare_multimodal_messages(row["prompt"], images=row["images"]),
            "chosen": prepare_multimodal_messages(row["chosen"]),
            "rejected": prepare_multimodal_messages(row["rejected"]),
        }
        return apply_chat_template(messages, self.processor)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text that is in the words of the chat template already."""
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def process_images(self, image_sets: list[list[Any]]) -> tuple[dict[str, torch.Tensor], list[list[list[int]]]]:
        """Run the processor once over all distinct images.

        Args:
            image_sets: for each set its images (PIL).

        Returns:
            its outputs about images, and for each set and image the tokens that its marker expands to.
        """
        if not image_sets:
            return {}, []
        marker, fence = self.processor.image_token, self.processor.tokenizer.eos_token
        fence_id = self.processor.tokenizer.eos_token_id
        # a text of nothing but markers, fenced by a token no expansion contains, shows what each marker becomes
        outputs = self.processor(
            images=image_sets,
            text=[fence.join([marker] * len(images)) for images in image_sets],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        about_text = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        image_inputs = {name: value for name, value in outputs.items() if name not in about_text}
        expansions = []
        for ids, mask, images in zip(outputs["input_ids"], outputs["attention_mask"], image_sets, strict=True):
            parts: list[list[int]] = [[]]
            for token in ids[mask.bool()].tolist():
                if token == fence_id:
                    parts.append([])
                else:
                    parts[-1].append(token)
            if len(parts) != len(images) or not all(self.image_token_id in part for part in parts):
                raise ModelError(
                    f"{type(self.processor).__name__} does not expand its image token {marker!r} into token "
                    f"{self.image_token_id}, the model's: {len(images)} image(s) gave {len(parts)} part(s).",
                    "Pass the processor that belongs to the model.",
                )
            expansions.append(parts)
        return image_inputs, expansions

    def expand(self, row: Mapping[str, Any], tokens: list[int], parts: list[list[int]]) -> list[int]:
        """Put each image's tokens where its marker stands in the tokenised prompt.

        Raises:
            DataError: if there are not as many markers as images, naming the row.
        """
        marker_id = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        if tokens.count(marker_id) != len(parts):
            raise DataError(
                f"Row {row.get('id')!r} has {len(parts)} image(s) and {tokens.count(marker_id)} image marker(s) in "
                "its prompt.",
                "Give one {'type': 'image'} part, or one marker in the text, per image.",
            )
        expanded: list[int] = []
        remaining = iter(parts)
        for token in tokens:
            expanded.extend(next(remaining) if token == marker_id else [token])
        return expanded
