"""Each image goes through the tower once, however many sequences show it."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def repeated_features(
    model: PreTrainedModel,
    token_counts: Sequence[int],
    shown: Sequence[int],
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Have the backbone encode each distinct image once and hand on its features wherever it is shown.

    Args:
        model: whose `base_model.get_image_features` is wrapped meanwhile.
        token_counts: image tokens of each distinct image, or of each group of images that always stand together.
        shown: which of these to hand on, in order.
        inputs: processor outputs about the distinct images, to be encoded in place of those that the model is called
            with; None where it is called with the distinct ones.
    """
    if inputs is None and list(shown) == list(range(len(token_counts))):
        yield
        return
    backbone = model.base_model
    encode = backbone.get_image_features
    names = list(inspect.signature(encode).parameters)

    def repeated(features: Any) -> Any:
        flat = torch.cat([part.flatten(0, -2) for part in features]) if not torch.is_tensor(features) else features
        parts = flat.flatten(0, -2).split(list(token_counts))
        chosen = [parts[image] for image in shown]
        return torch.cat(chosen) if torch.is_tensor(features) else chosen

    # `generate` reads the signature to know what to hand on
    @functools.wraps(encode)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        # by name: transformers' decorators of the method add names of their own
        called = dict(zip(names, args, strict=False)) | kwargs
        outputs = encode(**{name: (inputs or {}).get(name, value) for name, value in called.items()})
        outputs.pooler_output = repeated(outputs.pooler_output)
        if getattr(outputs, "deepstack_features", None) is not None:
            outputs.deepstack_features = [repeated(layer) for layer in outputs.deepstack_features]
        return outputs

    backbone.get_image_features = get_image_features
    try:
        yield
    finally:
        del backbone.get_image_features
