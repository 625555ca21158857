"""A LLaVA-architecture MLLM out of a bare vision encoder and a language model, as a plain transformers model.

What the paper starts from: encoder, a two-layer projector, an instructed language model (arXiv 2510.16333, section 3.1
and appendix E.1). Align and instruct it before its preferences are optimised.
"""

import copy
from pathlib import Path
from typing import Any, Literal

from accelerate import init_empty_weights
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ViTConfig,
    ViTMAEModel,
    ViTModel,
)

from pivot_plugin.encoders import graft, load_encoder
from pivot_plugin.errors import ModelError, SettingsError
from pivot_plugin.models.find import find_adapter

from .towers import draw_projector, image_processor_of

IMAGE_TOKEN = "<image>"
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
    projector: Literal["mlp2x"] | None = "mlp2x",
    feature_layer: int = -2,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: object | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Join a vision encoder and a language model to an MLLM that transformers loads alone.

    Args:
        encoder: any vision transformer (CLIP, SigLIP, DINO, ViT, ViT-MAE, an extracted InternViT, ...), loaded, or its
            folder or Hub id. Not changed. A Qwen-VL tower, which cuts patches of its own, makes a model of its own
            family, with a merger drawn by `seed`; the language model must be of the family's class then.
        language_model: any causal language model, loaded, or its folder or Hub id. Its modules become part of the MLLM.
        projector: "mlp2x": linear, GELU, linear, drawn by `seed`.
        feature_layer: hidden state of the encoder that the projector reads.
        tokenizer, image_processor: of loaded models; found by where these come from where None.
        chat_template: name of one in `CHAT_TEMPLATES`, or a Jinja template, for a language model that has none.
        seed: of the projector's weights.

    Returns:
        the MLLM in the language model's precision and on its device, in eval mode, and its processor.

    Raises:
        EncoderError: for an encoder that a LLaVA cannot read.
        ModelError: if a model cannot be loaded.
        SettingsError: for sizes that need a projector that is not given, or a language model without chat template.
    """
    tower, images = _encoder(encoder, image_processor)
    decoder, tokens = _language_model(language_model, tokenizer)
    width, wanted = getattr(tower.config, "hidden_size", None), decoder.config.get_text_config().hidden_size
    if projector != "mlp2x":
        raise SettingsError(
            f"The encoder gives {width} numbers per patch, the language model takes {wanted}, and projector is "
            f"{projector!r}.",
            'Use projector="mlp2x", the only one that LLaVA models have.',
        )
    template = _template(tokens, chat_template)
    tokens = copy.deepcopy(tokens)
    made = find_adapter(tower, encoder=True).assemble(decoder, tokens, images)
    if made is not None:
        draw_projector(find_adapter(made.model), seed)
        return made.model.eval(), made.processor(_with_images(template, made.image_text))
    tokens.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokens.pad_token is None:
        tokens.pad_token = tokens.eos_token
    model = _joined(decoder, tokens)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokens,
        patch_size=1,
        image_token=IMAGE_TOKEN,
        chat_template=_with_images(template, f"{IMAGE_TOKEN}\\n"),
    )
    graft(
        *(model, tower, "new"),
        processor=processor,
        image_processor=images,
        feature_layer=feature_layer,
        seed=seed,
    )
    return model.eval(), processor


def _joined(decoder: PreTrainedModel, tokens: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """A LLaVA around a language model, with a stand-in for the tower and the projector."""
    if len(tokens) > decoder.get_input_embeddings().num_embeddings:
        decoder.resize_token_embeddings(len(tokens), mean_resizing=False)
    text = decoder.config
    stand_in = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14, patch_size=14
    )
    config = LlavaConfig(
        vision_config=stand_in,
        text_config=text,
        image_token_index=tokens.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=tokens.pad_token_id,
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    place, precision = decoder.device, decoder.dtype
    model.model.vision_tower = CLIPVisionModel(stand_in).to(device=place, dtype=precision)
    kind = type(model.model.multi_modal_projector)
    model.model.multi_modal_projector = kind(config).to(device=place, dtype=precision)
    # what was made on the meta device and replaced must not be what the model believes to be tied
    model.tie_weights()
    model.generation_config = copy.deepcopy(decoder.generation_config)
    model.generation_config.pad_token_id = tokens.pad_token_id
    return model


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
            language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto")
        else:
            name = language_model.name_or_path
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
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
