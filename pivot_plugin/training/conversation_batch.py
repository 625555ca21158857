"""From conversations to one batch for TRL's SFTTrainer: every answer in the loss, nothing else."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.data.layout import text_of
from pivot_plugin.errors import DataError, ModelError
from pivot_plugin.models.image_tokens import ImageTokens, ProcessedImages

logger = logging.getLogger(__name__)

# the label that TRL's losses leave out
IGNORED = -100


@dataclass
class ConversationCollator:
    """Turns conversations into a batch for `SFTTrainer`.

    Args:
        processor: the model's own processor.
        image_token_id: the token that stands for one image feature.
        plain: an image and what is said about it alone, as LLaVA aligns a projector (its "plain" conversations): no
            question, no template, and a line break as the end.
        max_length: cut sequences to this many tokens; None never cuts.
        pad_to_multiple_of: lengthen rows with padding to a multiple of it.
    """

    processor: ProcessorMixin
    image_token_id: int
    plain: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    _told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.image_tokens = ImageTokens(self.processor, self.image_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate conversations.

        Args:
            rows: with `images` (PIL) and `messages`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (S, L), -100 where no answer stands; the processor's outputs about
            images; and `row_ids`, names of the rows.

        Raises:
            DataError: if images and markers of a row disagree, or `max_length` cuts into its images.
            ModelError: if the chat template rewrites earlier turns.
        """
        images = self.image_tokens.process_images([row["images"] for row in rows if row["images"]])
        remaining = iter(self._expansions(images))
        sequences = [self._labelled(row, next(remaining) if row["images"] else []) for row in rows]
        length = max(len(ids) for ids, _ in sequences)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        padding = self.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), padding)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, (ids, answers) in enumerate(sequences):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(answers)
            mask[index, : len(ids)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            **images.inputs,
            **self.image_tokens.token_types(input_ids),
            "row_ids": [str(row.get("id")) for row in rows],
        }

    def check(self, row: Mapping[str, Any], images: ProcessedImages) -> None:
        """Make sure that a conversation can be turned into tokens.

        Args:
            row: with `images` (PIL) and `messages`.
            images: of the row, processed.

        Raises:
            DataError, ModelError: as a call.
        """
        self._labelled(row, self._expansions(images)[0] if row["images"] else [])

    def _expansions(self, images: ProcessedImages) -> list[list[list[int]]]:
        """For each image set and image the tokens that its marker becomes."""
        if images.expansions is None:
            raise ModelError(
                f"{type(self.processor).__name__} rewrites the text around an image, so that the answers of a "
                "conversation cannot be found among its tokens.",
                "Use rows with one question each in `pivot.optimize`, or another model.",
            )
        return images.expansions

    def _labelled(self, row: Mapping[str, Any], parts: list[list[int]]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and its labels: these ids where an answer stands."""
        said = self.image_tokens.plain_text(row)
        texts = self._plain(said) if self.plain else self._turns(said)
        pieces = [self.image_tokens.tokens(text) for text, _ in texts]
        tokens = [token for piece in pieces for token in piece]
        is_answer = [answer for piece, (_, answer) in zip(pieces, texts, strict=True) for _ in piece]
        ids = self.image_tokens.expand(row, tokens, parts)
        # an image's marker becomes many tokens, none of them an answer
        lengths = iter([len(part) for part in parts])
        widths = [next(lengths) if token == self.image_tokens.marker_id else 1 for token in tokens]
        expanded = [answer for answer, width in zip(is_answer, widths, strict=True) for _ in range(width)]
        labels = [token if answer else IGNORED for token, answer in zip(ids, expanded, strict=True)]
        return self._cut(row, ids, labels)

    def _cut(self, row: Mapping[str, Any], ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Ids and labels, no longer than `max_length`."""
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, labels
        if self.image_token_id in ids[self.max_length :]:
            raise DataError(
                f"Row {row.get('id')!r} has {len(ids)} tokens, and max_length={self.max_length} cuts into its images.",
                "Raise max_length, set it to None, or let the processor make fewer tokens of an image.",
            )
        labels = labels[: self.max_length]
        if not self._told and all(label == IGNORED for label in labels):
            self._told = True
            logger.warning(
                "Row %r has %d tokens; max_length=%d leaves nothing of its answers. Such rows teach nothing.",
                row.get("id"),
                len(ids),
                self.max_length,
            )
        return ids[: self.max_length], labels

    def _plain(self, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """An image and what is said about it, with the begin token where the tokenizer would write one."""
        answer = text_of([message for message in row["messages"] if message["role"] == "assistant"])
        tokenizer = self.processor.tokenizer
        first = tokenizer("a")["input_ids"][:1]
        begin = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
        return [(begin + self._image_text() * len(row["images"]), False), (answer.strip() + "\n", True)]

    def _image_text(self) -> str:
        """What the chat template writes for an image."""
        text = {"type": "text", "text": "?"}
        with_image = self._written([{"role": "user", "content": [{"type": "image"}, text]}])
        without = self._written([{"role": "user", "content": [text]}])
        tail = without[without.index("?") :]
        head = without[: without.index("?")]
        return with_image.removeprefix(head).removesuffix(tail)

    def _turns(self, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """A conversation in the words of the chat template, cut where answers begin and end."""
        messages = prepare_multimodal_messages(row["messages"], images=row["images"])
        whole = self._written(messages)
        pieces, done = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._written(messages[:index], add_generation_prompt=True)
            through = self._written(messages[: index + 1])
            if not whole.startswith(through) or not through.startswith(before):
                raise ModelError(
                    f"The chat template of {type(self.processor).__name__} writes a turn differently once another "
                    f"follows it, so that the answers of row {row.get('id')!r} cannot be told from its questions.",
                    "Pass a processor whose chat template leaves earlier turns as they are.",
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(through)], True)]
            done = len(through)
        return pieces

    def _written(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.processor.apply_chat_template(messages, tokenize=False, **options)
        return text
