"""What the zoo has to be told about a family, beyond what transformers knows of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ZooFamily:
    """How one family's tiny model and its processor differ from what the common rules make.

    Attributes:
        name: name in the zoo; mostly the model type.
        marker: what the chat template writes where an image is.
        model_type: key of transformers' auto classes.
        tokens: special tokens that the family's tokenizer has as attributes, by role, as in {"image_token": "<image>"}.
        model_tokens: roles in the configuration that are filled by another token than the tokenizer's of that name.
        unnamed_tokens: further special tokens.
        text_tokens: further tokens that every tokenizer may have and this processor wants, as in {"bos_token": "<s>"}.
        tokenizer_settings: what a published tokenizer would add to the processor's defaults.
        config: settings of the configuration that the rules of `tiny_config` do not get right.
        processor: name of the processor class, where the auto classes do not know it.
        processor_settings: what the processor class is given besides its parts.
        image_processor: name of the image processor class, where the auto classes do not know it.
        image_settings: what makes the image processor's images small.
        video_processor: name of the video processor class, where the auto classes do not know it.
        video_settings: what the video processor is given.
        feature_extractor: name of the feature extractor class, where the auto classes do not know it.
        needs: packages that transformers wants for this family alone.
    """

    name: str
    marker: str = "<image>"
    model_type: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)
    model_tokens: Mapping[str, str] = field(default_factory=dict)
    unnamed_tokens: tuple[str, ...] = ()
    text_tokens: Mapping[str, str] = field(default_factory=dict)
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    processor: str | None = None
    processor_settings: Mapping[str, Any] = field(default_factory=dict)
    image_processor: str | None = None
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    video_processor: str | None = None
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    feature_extractor: str | None = None
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_type:
            object.__setattr__(self, "model_type", self.name)
