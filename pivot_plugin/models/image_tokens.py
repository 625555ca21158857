"""Text as tokens with its images expanded, and which of a processor's outputs are about the images.

Training, generation and the check of data all need this, so it stands below them, and knows rows only as mappings with
`images` (PIL) and messages.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from pivot_plugin.errors import DataError, ModelError

SEQUENCE = ("input_ids", "attention_mask")
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


class ImageTokens:
    """Turns texts and images into tokens the way a model's processor does, each image processed once.

    Args:
        processor: the model's own processor.
        image_token_id: the token that stands for one image feature; what the processor's marker is where None.
    """

    def __init__(self, processor: ProcessorMixin, image_token_id: int | None = None) -> None:
        self.processor = processor
        self.marker_id: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.image_token_id = self.marker_id if image_token_id is None else image_token_id

    def texts(self, row: Mapping[str, Any]) -> dict[str, str]:
        """A row's prompt, and its answers where it has them, in the words of the chat template, by TRL's own functions.

        Args:
            row: with `images` and `prompt`, `chosen`, `rejected` (messages).
        """
        messages = {
            "prompt": prepare_multimodal_messages(row["prompt"], images=list(row["images"])),
            "chosen": prepare_multimodal_messages(row["chosen"]),
            "rejected": prepare_multimodal_messages(row["rejected"]),
        }
        return apply_chat_template(messages, self.processor)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text that is in the words of the chat template already."""
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def process_images(
        self, image_sets: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, torch.Tensor], list[list[list[int]]]]:
        """Run the processor once over all distinct images.

        Args:
            image_sets: for each set its images (PIL).

        Returns:
            its outputs about images, and for each set and image the tokens that its marker expands to.

        Raises:
            ModelError: if the processor makes something else of the markers.
        """
        if not image_sets:
            return {}, []
        marker, fence = self.processor.image_token, self.processor.tokenizer.eos_token
        fence_id = self.processor.tokenizer.eos_token_id
        # a text of nothing but markers, fenced by a token no expansion contains, shows what each marker becomes
        outputs = self.processor(
            images=[list(images) for images in image_sets],
            text=[fence.join([marker] * len(images)) for images in image_sets],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
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

    def counts(self, parts: Sequence[list[int]]) -> list[int]:
        """Image tokens of each image, given what each marker expands to."""
        return [part.count(self.image_token_id) for part in parts]

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
