"""A vision tower out of one MLLM and into another."""

from transformers import PreTrainedModel

from pivot_plugin.training.tower import find_adapter


def extract_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the vision tower of an MLLM as a stand-alone transformers model.

    All its layers are kept, also those behind the one the MLLM reads.

    Args:
        model: the MLLM; not changed.

    Raises:
        ModelError: if it has no vision tower, or no adapter knows it.
    """
    return find_adapter(model).extract()


def graft(model: PreTrainedModel, encoder: PreTrainedModel) -> PreTrainedModel:
    """Put an encoder's weights into the vision tower of an MLLM.

    Args:
        model: the MLLM; its tower is changed in place, its device and precision stay.
        encoder: stand-alone, of the same class and sizes, as `extract_encoder` or `load_encoder` return it.

    Returns:
        The model.

    Raises:
        EncoderError: naming the first mismatch; the model is unchanged then.
        ModelError: if the model has no vision tower, or no adapter knows it.
    """
    find_adapter(model).graft(encoder)
    return model
