"""Text as tokens with its images expanded, and which of a processor's outputs are about the images.

Training, generation and the check of data all need this, so it stands below them, and knows rows only as mappings with
`images` (PIL) and messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from pivot_plugin.errors import DataError, ModelError

from .control_text import ControlText

SEQUENCE = ("input_ids", "attention_mask")
# by which transformers says that a batch cannot be made one tensor
RAGGED = "Unable to convert output"
# any picture does: what is read off its outputs are names
PROBE = Image.new("RGB", (64, 64))


def about_images(outputs: Mapping[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    """Those of a processor's outputs that are about images, not about text.

    An output is about text if it has a value per token: the shape of `input_ids`. One that the image processor itself
    names is about images, whatever its shape: three images of three patches each have a (3, 3) grid beside (3, 3)
    tokens.

    Args:
        outputs: of the processor, as tensors.
        processor: that made them.
    """
    named = set(processor.image_processor.model_input_names)
    shape = outputs["input_ids"].shape
    return {name: value for name, value in outputs.items() if name in named or getattr(value, "shape", None) != shape}


@dataclass(frozen=True)
class ProcessedImages:
    """Image sets as a processor makes them.

    Attributes:
        inputs: the processor's outputs about all images, one set after the other.
        counts: for each set the image tokens of each of its images; where the processor is given whole prompts, those
            of all of them for the first, and none for the others, which is the same to whoever takes a set as a whole.
        expansions: for each set and image the tokens that its marker becomes; None where only whole prompts tell.
    """

    inputs: dict[str, torch.Tensor]
    counts: list[list[int]]
    expansions: list[list[list[int]]] | None

    def expansions_of(self, image_set: int) -> list[list[int]] | None:
        """For each image of a set the tokens that its marker becomes; None where only whole prompts tell.

        Args:
            image_set: its number, -1 for a prompt without images.
        """
        if image_set < 0:
            return []
        return None if self.expansions is None else self.expansions[image_set]


class ImageTokens:
    """Turns texts and images into tokens the way a model's processor does, each image processed once.

    Most processors replace one marker by an image's tokens and leave the text around it alone, so that markers without
    text tell what each image becomes. Others are given every prompt as a whole, with its images.

    Args:
        processor: the model's own processor.
        image_token_id: the token that stands for one image feature; what the processor's marker is where None.
        whole_prompts: whether the processor is given whole prompts; found out with a probe where None.
    """

    def __init__(
        self, processor: ProcessorMixin, image_token_id: int | None = None, whole_prompts: bool | None = None
    ) -> None:
        self.processor = processor
        marker = getattr(processor, "image_token", None)
        named = None if marker is None else processor.tokenizer.convert_tokens_to_ids(str(marker))
        if image_token_id is None and named is None:
            raise ModelError(
                f"{type(processor).__name__} names no image token.", "Pass the processor that belongs to the model."
            )
        self.image_token_id: int = named if image_token_id is None else image_token_id  # type: ignore[assignment]
        self._named = named
        self._whole_prompts = whole_prompts

    @cached_property
    def control_text(self) -> ControlText:
        """Names of control tokens in what users wrote."""
        return ControlText(self.processor)

    @cached_property
    def marker_id(self) -> int:
        """The token that stands for an image before the processor expands it."""
        return self.image_token_id if self._named == self.image_token_id else self._marker_by_example()

    def _marker_by_example(self) -> int:
        """The token of a prompt in whose place the processor puts an image's tokens."""
        text = self.image_prompt(1)
        before = self.tokens(text)
        after = self.processed([[PROBE]], [text])["input_ids"][0].tolist()
        start = _agreement(before, after)
        behind = _agreement(before[start:][::-1], after[start:][::-1])
        # the expansion may begin or end with the marker itself
        if len(before) - behind == start:
            start = max(0, start - 1)
        replaced = before[start : len(before) - behind]
        if len(replaced) != 1 or self.image_token_id not in after[start : len(after) - behind]:
            raise ModelError(
                f"{type(self.processor).__name__} makes no token {self.image_token_id}, the model's image token, of "
                f"the image in {text!r}.",
                "Pass the processor that belongs to the model.",
            )
        return replaced[0]

    def image_prompt(self, images: int) -> str:
        """A question about some pictures, in the words of the chat template.

        Args:
            images: how many.
        """
        content = [*[{"type": "image"}] * images, {"type": "text", "text": "?"}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text

    @cached_property
    def whole_prompts(self) -> bool:
        """Whether the processor is given every prompt as a whole, because markers alone do not tell what it makes."""
        if self._whole_prompts is not None:
            return self._whole_prompts
        try:
            self._fenced([[PROBE], [PROBE]])
        # processors are foreign code; what they raise of markers without text says that they want more
        except Exception:
            return True
        return False

    def processed(self, image_sets: Sequence[Sequence[Any]], texts: Sequence[str]) -> dict[str, Any]:
        """What the processor makes of prompts with their images, in one call.

        Args:
            image_sets: for each prompt its images (PIL).
            texts: prompts in the words of the chat template.

        Raises:
            ModelError: if the processor cannot put these images into one batch.
        """
        settings = {"text": list(texts), "padding": True, "return_tensors": "pt", "add_special_tokens": False}
        try:
            outputs = self.processor(images=[list(images) for images in image_sets], **settings)
        except (ValueError, TypeError) as error:
            if RAGGED in str(error):
                sizes = sorted({f"{image.width}x{image.height}" for images in image_sets for image in images})
                raise ModelError(
                    f"{type(self.processor).__name__} cannot put images of {', '.join(sizes)} px into one batch, "
                    "because it makes different numbers of views of them.",
                    "Bring the images to one shape, or have its image processor cut no tiles.",
                ) from error
            # a few take one image per prompt, in a flat list
            if any(len(images) != 1 for images in image_sets):
                raise
            outputs = self.processor(images=[images[0] for images in image_sets], **settings)
        # some processors add what a loss would want
        return {name: value for name, value in outputs.items() if name != "labels"}

    def texts(self, row: Mapping[str, Any]) -> dict[str, str]:
        """A row's prompt, and its answers where it has them, in the words of the chat template, by TRL's own functions.

        The names of control tokens in its words have stand-ins, which `tokens` reads as words.

        Args:
            row: with `images` and `prompt`, `chosen`, `rejected` (messages).

        Raises:
            DataError: for such names where they would become control tokens.
        """
        row = self.plain_text(row)
        messages = {
            "prompt": prepare_multimodal_messages(row["prompt"], images=list(row["images"])),
            "chosen": prepare_multimodal_messages(row["chosen"]),
            "rejected": prepare_multimodal_messages(row["rejected"]),
        }
        return apply_chat_template(messages, self.processor)

    def plain_text(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row in whose words the names of control tokens stay words; itself where there are none.

        Args:
            row: in a normal form.

        Raises:
            DataError: where that cannot be.
        """
        plain = self.control_text.standing_in(row)
        if plain is not row and row["images"] and self.whole_prompts:
            self.control_text.refuse(row, f"{type(self.processor).__name__} reads it as one")
        return plain

    def reworded(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row as a processor can be given it: with other words for the names of control tokens in its own.

        `with_words` puts the row's own words into what the processor makes of it.

        Args:
            row: in the normal form of questions.

        Raises:
            DataError: where its own words cannot be kept words.
        """
        self.plain_text(row)
        return self.control_text.without(row)

    def question_text(self, row: Mapping[str, Any]) -> str:
        """A question up to where its answer begins, in the words of the chat template.

        Args:
            row: with `images` and `prompt` (messages).
        """
        messages = prepare_multimodal_messages(row["prompt"], images=list(row["images"]))
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def question(self, row: Mapping[str, Any], expansions: Sequence[list[int]], given: Sequence[int]) -> list[int]:
        """A question as tokens, in which the names of control tokens in its words are words.

        Args:
            row: with `images` and `prompt` (messages).
            expansions: for each of its images the tokens that its marker becomes.
            given: what the processor made of the row in other words (`reworded`).

        Raises:
            DataError: where the processor put other tokens for its images there.
        """
        tokens = self.prompt(row, self.question_text(self.plain_text(row)), expansions)
        if tokens.count(self.image_token_id) != list(given).count(self.image_token_id):
            self.control_text.refuse(row, f"{type(self.processor).__name__} makes something else of its images there")
        return tokens

    def with_words(self, rows: Sequence[Mapping[str, Any]], outputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the processor made of questions in other words, with their own; as it is where those are the same.

        Args:
            rows: questions, with `images` (PIL) and `prompt` (messages).
            outputs: of the processor about `reworded` of them, as tensors, padded on the left.

        Raises:
            DataError: as `question`.
        """
        changed = [bool(self.control_text.in_row(row)) for row in rows]
        if not any(changed):
            return dict(outputs)
        with_images = [number for number, row in enumerate(rows) if row["images"]]
        of_set = {number: image_set for image_set, number in enumerate(with_images)}
        needed = any(changed[number] for number in with_images)
        images = self.process_images([rows[number]["images"] for number in with_images] if needed else [])
        sequences = [
            ids[mask.bool()].tolist() for ids, mask in zip(outputs["input_ids"], outputs["attention_mask"], strict=True)
        ]
        for number, row in enumerate(rows):
            if changed[number]:
                # a row with images that is given as a whole is refused before it comes here
                expansions = images.expansions_of(of_set.get(number, -1)) or []
                sequences[number] = self.question(row, expansions, sequences[number])
        width = max(map(len, sequences))
        ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, sequence in enumerate(sequences):
            ids[number, width - len(sequence) :] = torch.tensor(sequence)
            mask[number, width - len(sequence) :] = 1
        beside = about_images(outputs, self.processor)
        return {**beside, "input_ids": ids, "attention_mask": mask, **self.token_types(ids)}

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text that is in the words of the chat template already."""
        plain = self.control_text.tokens(text)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if plain is None else plain

    def process_images(
        self, image_sets: Sequence[Sequence[Any]], texts: Sequence[str] | None = None
    ) -> ProcessedImages:
        """Run the processor once over all distinct images.

        Args:
            image_sets: for each set its images (PIL).
            texts: for each set a prompt that shows it, for processors that are given whole prompts; a question of no
                words where None.

        Raises:
            ModelError: if the processor makes something else of the images.
        """
        if not image_sets:
            return ProcessedImages({}, [], [])
        if not self.whole_prompts:
            inputs, expansions = self._fenced(image_sets)
            counts = [[part.count(self.image_token_id) for part in parts] for parts in expansions]
            return ProcessedImages(inputs, counts, expansions)
        outputs = self.processed(image_sets, texts or [self.image_prompt(len(images)) for images in image_sets])
        totals = (outputs["input_ids"] == self.image_token_id).sum(dim=1).tolist()
        if not all(totals):
            raise ModelError(
                f"{type(self.processor).__name__} makes no token {self.image_token_id}, the model's image token, of an "
                "image.",
                "Pass the processor that belongs to the model.",
            )
        counts = [[total] + [0] * (len(images) - 1) for total, images in zip(totals, image_sets, strict=True)]
        return ProcessedImages(about_images(outputs, self.processor), counts, None)

    def prompt(self, row: Mapping[str, Any], text: str, expansions: Sequence[list[int]] | None) -> list[int]:
        """A prompt as tokens, with the tokens of its images.

        Args:
            row: that it is of, with `images` and `id`.
            text: in the words of the chat template.
            expansions: of its images; None where the processor is given the whole prompt.

        Raises:
            DataError: if there are not as many markers as images, naming the row.
        """
        if expansions is not None or not row["images"]:
            return self.expand(row, self.tokens(text), expansions or [])
        tokens: list[int] = self.processed([row["images"]], [text])["input_ids"][0].tolist()
        return tokens

    def rewrites(self, row: Mapping[str, Any], text: str) -> bool:
        """Whether the processor makes other tokens of a whole prompt than of its text and its images apart.

        Args:
            row: that the prompt is of, with `images` and `id`.
            text: of the prompt, in the words of the chat template.
        """
        if not row["images"]:
            return False
        whole: list[int] = self.processed([row["images"]], [text])["input_ids"][0].tolist()
        images = self.process_images([row["images"]], [text])
        return images.expansions is not None and self.prompt(row, text, images.expansions[0]) != whole

    def _fenced(self, image_sets: Sequence[Sequence[Any]]) -> tuple[dict[str, torch.Tensor], list[list[list[int]]]]:
        """The processor's outputs about images, and for each set and image the tokens that its marker becomes."""
        marker = self.processor.tokenizer.convert_ids_to_tokens(self.marker_id)
        fence = self.processor.tokenizer.eos_token
        fence_id = self.processor.tokenizer.eos_token_id
        # a text of nothing but markers, fenced by a token no expansion contains, shows what each marker becomes
        outputs = self.processed(image_sets, [fence.join([marker] * len(images)) for images in image_sets])
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
        return about_images(outputs, self.processor), expansions

    def expand(self, row: Mapping[str, Any], tokens: list[int], parts: Sequence[list[int]]) -> list[int]:
        """Put each image's tokens where its marker stands in the tokenised prompt.

        Args:
            row: that the prompt is of; its `id` names it in errors.
            tokens: of the prompt, one marker per image.
            parts: for each image the tokens that its marker expands to.

        Raises:
            DataError: if there are not as many markers as images, naming the row.
        """
        markers = tokens.count(self.marker_id)
        if markers != len(parts):
            raise DataError(
                f"Row {row.get('id')!r} has {len(parts)} image(s) and {markers} image marker(s) in its prompt.",
                "Give one {'type': 'image'} part, or one marker in the text, per image.",
            )
        expanded: list[int] = []
        remaining = iter(parts)
        for token in tokens:
            expanded.extend(next(remaining) if token == self.marker_id else [token])
        return expanded

    @cached_property
    def _probed(self) -> dict[str, torch.Tensor]:
        """What the processor gives for one image and its marker."""
        return dict(
            self.processor(
                images=[[PROBE]], text=[self.processor.image_token], return_tensors="pt", add_special_tokens=False
            )
        )

    @property
    def image_names(self) -> set[str]:
        """Names of all outputs that a text with an image has beside its tokens and their mask."""
        return set(self._probed) - set(SEQUENCE)

    def token_types(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs beside ids and mask in which the model is told, per token, where images stand.

        Args:
            input_ids: (S, L), images expanded.

        Returns:
            by name (S, L) integers, zero for text; nothing where the model asks for none.
        """
        is_image = self._probed["input_ids"] == self.image_token_id
        per_token = self.image_names - set(about_images(self._probed, self.processor))
        return {
            name: (input_ids == self.image_token_id) * int(self._probed[name][is_image][0])
            for name in sorted(per_token)
        }


def _agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
