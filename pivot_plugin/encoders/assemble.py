"""An MLLM out of a bare vision encoder and a language model, as a plain transformers model.

Which MLLM that is, and how it is built, the encoder's adapter knows; here is what all of them need: both models, and a
chat template that knows images. What the paper starts from is encoder, a two-layer projector, an instructed language
model (arXiv 2510.16333, section 3.1 and appendix E.1). Align and instruct it before its preferences are optimised.
"""

import copy
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ViTConfig,
    ViTMAEModel,
    ViTModel,
)

from pivot_plugin.adapters.base import Assembled
from pivot_plugin.errors import EncoderError, ModelError, SettingsError
from pivot_plugin.models.find import find_adapter, find_adapters

from .loading import load_encoder
from .towers import DEFAULT_FEATURE_LAYER, draw_projector, image_processor_of, note_origin

# By name, for language models without a template. "chatml" as Qwen's, "plain" for base models that never saw turns.
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    ),
}
# a language model's template knows texts alone: parts are written out as text before it sees them, images as a token
_PARTS_AS_TEXT = (
    "{%- set seen = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set seen.messages = seen.messages + [message] -%}"
    "{%- else -%}{%- set written = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set written.text = written.text + 'IMAGE_TEXT' -%}"
    "{%- else -%}{%- set written.text = written.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set seen.messages = seen.messages + [dict(message, content=written.text)] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- set messages = seen.messages -%}"
)


def assemble(
    encoder: PreTrainedModel | str | Path,
    language_model: PreTrainedModel | str | Path,
    feature_layer: int = DEFAULT_FEATURE_LAYER,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: object | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Join a vision encoder and a language model to an MLLM that transformers loads alone.

    Args:
        encoder: any vision transformer (CLIP, SigLIP, DINO, ViT, ViT-MAE, an extracted InternViT, ...), loaded, or its
            folder or Hub id. Not changed. It makes a LLaVA, with a projector of two linear layers; but a Qwen-VL tower,
            which cuts patches of its own, makes a model of its own family, whose language model must be of the family's
            class.
        language_model: any causal language model, loaded, or its folder or Hub id. Its modules become part of the MLLM.
        feature_layer: hidden state of the encoder that the projector reads.
        tokenizer, image_processor: of loaded models; found by where these come from where None.
        chat_template: name of one in `CHAT_TEMPLATES`, or a Jinja template, for a language model that has none.
        seed: of the projector's weights.

    Returns:
        the MLLM in the language model's precision and on its device, in eval mode, and its processor.

    Raises:
        EncoderError: for an encoder that no MLLM can read, or a language model that its family cannot have.
        ModelError: if a model cannot be loaded.
        SettingsError: for a language model without chat template.
    """
    tower, images = _encoder(encoder, image_processor)
    decoder, tokenizer = _language_model(language_model, tokenizer)
    template = _template(tokenizer, chat_template)
    made = _made(tower, decoder, copy.deepcopy(tokenizer), images, feature_layer)
    draw_projector(find_adapter(made.model), seed)
    note_origin(made.model, tower)
    return made.model.eval(), made.processor(_with_images(template, made.image_text))


def _made(
    tower: PreTrainedModel,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: object,
    feature_layer: int,
) -> Assembled:
    """The MLLM of the first adapter that makes one of this encoder."""
    for adapter in find_adapters(tower):
        made = adapter.assemble(decoder, tokenizer, image_processor, feature_layer)
        if made is not None:
            return made
    raise EncoderError(
        f"No adapter makes an MLLM of a {type(tower).__name__}.",
        "Install or write a plugin whose adapter overrides assemble; `pivot adapters` lists what is installed.",
    )


def _encoder(encoder: PreTrainedModel | str | Path, image_processor: object | None) -> tuple[PreTrainedModel, Any]:
    if isinstance(encoder, str | Path):
        encoder, loaded = load_encoder(encoder, with_processor=True)
        image_processor = image_processor or loaded
    if isinstance(encoder, ViTMAEModel):
        return _without_masking(encoder), image_processor or image_processor_of(encoder)
    return encoder, image_processor or image_processor_of(encoder)


def _without_masking(masked: ViTMAEModel) -> ViTModel:
    """A masked autoencoder's encoder as the plain vision transformer that it is; by itself it shuffles its patches."""
    known = {name: value for name, value in masked.config.to_dict().items() if name in ViTConfig().to_dict()}
    plain = ViTModel(ViTConfig(**{**known, "model_type": "vit", "architectures": None}))
    # a pooler that nothing reads is part of the class, and a saved model is asked for it
    own = {name: value for name, value in plain.state_dict().items() if name.startswith("pooler.")}
    plain.load_state_dict({**own, **masked.state_dict()})
    plain.config._name_or_path = masked.name_or_path
    return plain.to(device=masked.device, dtype=masked.dtype).eval()


def _language_model(
    language_model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name: object = language_model
    try:
        if isinstance(language_model, str | Path):
            language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto", trust_remote_code=False)
        else:
            name = language_model.name_or_path
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No language model with its tokenizer could be loaded from {str(name)!r}: {error}",
            "Give a folder or Hub id of a causal language model, or pass tokenizer=.",
        ) from error
    if not language_model.can_generate() or language_model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(language_model).__name__} is no causal language model: it has no output head.",
            "Load it by AutoModelForCausalLM.",
        )
    return language_model, tokenizer


def _template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    own = CHAT_TEMPLATES.get(given, given) if given is not None else tokenizer.chat_template
    if not own:
        raise SettingsError(
            f"The language model's tokenizer ({type(tokenizer).__name__}) has no chat template.",
            f"Pass chat_template=, a template or one of {', '.join(map(repr, CHAT_TEMPLATES))}.",
        )
    if "messages" not in own:
        raise SettingsError(
            f"chat_template={given!r} is no template.", f"Give Jinja, or one of {', '.join(map(repr, CHAT_TEMPLATES))}."
        )
    return own


def _with_images(template: str, image_text: str) -> str:
    """A template for texts as one for messages with parts, in which an image is a text of its own."""
    return _PARTS_AS_TEXT.replace("IMAGE_TEXT", image_text) + template
