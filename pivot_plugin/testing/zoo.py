"""A zoo: a tiny model of every image-text-to-text family that transformers has, with its own processor, no network.

`families` has those that this package has adapters for; the zoo has all the others. Every model is its family's own
class with random weights and every setting that makes the family what it is; only the sizes are small.
"""

import importlib.util

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .zoo_processors import zoo_processor, zoo_token_ids
from .zoo_record import ZooFamily
from .zoo_shrinking import tiny_config
from .zoo_table import TABLE, UNSUPPORTED

__all__ = ["FAMILIES", "UNSUPPORTED", "ZooFamily", "build", "missing_packages"]

# an older transformers does not have all of them
FAMILIES: dict[str, ZooFamily] = {
    family.name: family for family in TABLE if family.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
}


def missing_packages(name: str) -> list[str]:
    """Packages that a family needs and that are not installed.

    Args:
        name: a key of `FAMILIES`.

    Raises:
        KeyError: for a name that is not in `FAMILIES`.
    """
    return [package for package in FAMILIES[name].needs if importlib.util.find_spec(package) is None]


def build(name: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A family's tiny model, in float32 and eval mode, and its processor.

    Args:
        name: a key of `FAMILIES`.
        seed: of the random weights; torch's own random state is left as it was.

    Returns:
        The model and the processor.

    Raises:
        KeyError: for a name that is not in `FAMILIES`.
        ImportError: from transformers, if a package in `missing_packages` is not installed.
    """
    family = FAMILIES[name]
    processor = zoo_processor(family)
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family.model_type])
    config = tiny_config(
        model_class.config_class,
        family.config,
        # embeddings are padded to a round number in most published models
        vocabulary=-(-len(processor.tokenizer) // 8) * 8,
        token_ids=zoo_token_ids(family, processor.tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            _draw(parameter)
    return model.float().eval(), processor


def _draw(parameter: torch.nn.Parameter) -> None:
    """Weights wide enough that what a picture shows reaches the logits, through any number of layers."""
    if parameter.ndim > 1:
        inputs = parameter[0].numel()
        torch.nn.init.normal_(parameter, std=max(0.08, inputs**-0.5))
    elif parameter.numel() == 1:
        # a gate, which starts closed
        torch.nn.init.constant_(parameter, 0.5)
