"""What a model and a processor are, as hashes: two that give other results have other fingerprints."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import ProcessorMixin

# what a configuration notes of where a model was read from and how it was written: a model that is moved, or saved and
# loaded again, is the same one; precisions are those of the tensors
BOOKKEEPING = ("transformers_version", "_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype")


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights, names, types and configuration: any change of a weight changes it."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        digest.update(json.dumps(_settings(config.to_dict()), sort_keys=True, default=str).encode())
        digest.update(str(config.get_text_config()._attn_implementation).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


# numbers of a tensor that tell it from another
SAMPLED = 1024


def model_sample(model: torch.nn.Module) -> str:
    """A hash of a model's names, types and some numbers of every tensor: cheap, and different for other weights.

    Args:
        model: whole, on any device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        numbers = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(numbers.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _settings(noted: Any) -> Any:
    """A configuration, or a part of one, without its bookkeeping."""
    if isinstance(noted, dict):
        return {str(key): _settings(value) for key, value in noted.items() if key not in BOOKKEEPING}
    return noted


def weights_fingerprint(weights: Iterable[torch.Tensor]) -> str:
    """A hash of the numbers of some weights, whatever they are called and in which precision they were loaded.

    Args:
        weights: in any order; rounded to bfloat16 first, which a model in float32 or float16 can be loaded as.
    """
    digests = []
    for tensor in weights:
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten()
        digests.append(hashlib.sha256(rounded.view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def processor_fingerprint(processor: ProcessorMixin) -> str:
    """A hash of everything in a processor that changes what the model is given."""
    parts = [
        json.dumps(processor.to_dict(), sort_keys=True, default=str),
        json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str),
        str(processor.chat_template or processor.tokenizer.chat_template),
        processor.tokenizer.backend_tokenizer.to_str(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
