"""A bare encoder and a language model become an MLLM: weights of both, the right tokens, plain transformers on disk."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionModel,
)

import pivot_plugin as pivot
from pivot_plugin.adapters.base import Assembled, VisionAdapter
from pivot_plugin.adapters.llava import EncoderAdapter
from pivot_plugin.encoders import save_encoder
from pivot_plugin.errors import EncoderError, ModelError, SettingsError
from pivot_plugin.hooks import hookimpl, manager
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import features, subject
from tests.helpers import picture, row
from tests.helpers.encoders import ENCODERS, HEADS, LANGUAGE_MODELS, TEXT, encoder, language_model, plain, vit_processor


def assembled(kind: str = "siglip", text: str = "qwen2", **options: Any) -> Any:
    (tower, images, _), (decoder, tokenizer) = encoder(kind), language_model(text)
    return pivot.assemble(tower, decoder, tokenizer=tokenizer, image_processor=images, **options)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_every_encoder_keeps_its_weights_its_grid_and_its_tokens(kind: str, tmp_path: Path) -> None:
    tower, images, beside = encoder(kind)
    decoder, tokenizer = language_model()
    before = copy.deepcopy(tower.state_dict())
    model, processor = pivot.assemble(tower, decoder, tokenizer=tokenizer, image_processor=images)
    inside = find_adapter(model).tower.state_dict()
    for name, tensor in before.items():
        assert torch.equal(inside[name], tensor), name
    inputs = processor(images=[picture(100, 60, 1)], text="<image> what?", return_tensors="pt")
    # the class token is dropped, as LLaVA does; registers stay
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 36 + beside - bool(beside)
    found = features(subject(model, processor), [picture(84, 84, 1)], cache=False)
    assert found.grids.tolist() == [[6, 6]]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert plain(tmp_path).startswith("(1, ")


def test_a_masked_autoencoder_is_read_in_order() -> None:
    """By itself ViT-MAE shuffles its patches and drops most of them."""
    tower, images, _ = encoder("vit-mae")
    decoder, tokenizer = language_model()
    model, processor = pivot.assemble(tower, decoder, tokenizer=tokenizer, image_processor=images)
    pixels = images(images=[picture(84, 84, 1)], return_tensors="pt")["pixel_values"]
    tower.config.mask_ratio = 0.0
    with torch.no_grad():
        shuffled = tower(pixels, noise=torch.arange(36.0)[None], output_hidden_states=True).hidden_states[-2][0, 1:]
    found = features(subject(model, processor), [picture(84, 84, 1)], cache=False)
    torch.testing.assert_close(found.patches(0), shuffled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", list(LANGUAGE_MODELS))
def test_every_language_model_says_without_images_what_it_said_before(text: str, tmp_path: Path) -> None:
    decoder, tokenizer = language_model(text)
    tokens = tokenizer("how are you?", return_tensors="pt")
    with torch.no_grad():
        expected = decoder(**tokens).logits
    tower, images, _ = encoder("clip")
    model, processor = pivot.assemble(tower, decoder, tokenizer=tokenizer, image_processor=images)
    with torch.no_grad():
        found = model(**tokens).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == bool(
        decoder.config.tie_word_embeddings
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain(tmp_path)
    answer = model.generate(
        **processor(images=[picture(60, 60, 1)], text="<image> ?", return_tensors="pt"), max_new_tokens=3
    )
    assert answer.shape[1] > 36


def test_the_chat_template_is_the_language_model_s_own_with_images_as_tokens() -> None:
    _, tokenizer = language_model()
    _, processor = assembled()
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    own = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(said, add_generation_prompt=True) == own
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}, said[1]]
    assert processor.apply_chat_template(shown, add_generation_prompt=True) == own.replace("hello", "<image>\nhello")


def test_the_projector_is_drawn_by_the_seed_and_the_language_model_s_precision_is_kept() -> None:
    first, second, third = (assembled(seed=seed)[0].model.multi_modal_projector for seed in (1, 1, 2))
    assert torch.equal(first.linear_1.weight, second.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, third.linear_1.weight)
    assert (first.linear_1.in_features, first.linear_2.out_features) == (48, 32)
    (tower, images, _), (decoder, tokenizer) = encoder("siglip"), language_model()
    model, _ = pivot.assemble(tower, decoder.to(torch.bfloat16), tokenizer=tokenizer, image_processor=images)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tower.dtype == torch.float32


def test_an_extracted_internvit_and_a_folder_of_ours_are_encoders_too(make: Any, tmp_path: Path) -> None:
    model, processor = make("internvl")
    folder = save_encoder(find_adapter(model), processor, tmp_path / "encoder", {})
    decoder, tokenizer = language_model("llama")
    decoder.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    built, processor = pivot.assemble(folder, tmp_path / "text")
    assert type(find_adapter(built).tower).__name__ == "InternVLVisionModel"
    built.save_pretrained(tmp_path / "mllm")
    processor.save_pretrained(tmp_path / "mllm")
    plain(tmp_path / "mllm")


def test_what_is_assembled_can_be_optimised(fast: Any) -> None:
    model, processor = assembled("dinov2-registers")
    pairs = [row(f"{n}?", "yes", "no!", picture(60, 60, n)) for n in range(8)]
    result = pivot.optimize(model, pairs, processor=processor, eval_fraction=0, **fast)
    assert result.trained["encoder"][0] > 0
    assert max(result.weight_change.values()) > 0


def test_what_cannot_be_assembled_is_named(make: Any) -> None:
    (tower, images, _), (decoder, tokenizer) = encoder("siglip"), language_model()
    given = {"tokenizer": tokenizer, "image_processor": images}
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = None
    with pytest.raises(SettingsError, match="has no chat template") as caught:
        pivot.assemble(tower, decoder, tokenizer=silent, image_processor=images)
    assert "'chatml'" in caught.value.remedy and "'plain'" in caught.value.remedy
    assert pivot.assemble(tower, decoder, tokenizer=silent, image_processor=images, chat_template="plain")
    with pytest.raises(SettingsError, match="is no template"):
        pivot.assemble(tower, decoder, chat_template="vicuna", **given)
    with pytest.raises(ModelError, match="has no output head"):
        pivot.assemble(tower, Qwen2Model(Qwen2Config(**TEXT, **HEADS)), **given)
    with pytest.raises(ModelError, match="No language model with its tokenizer"):
        pivot.assemble(tower, "absent/model", image_processor=images)
    with pytest.raises(SettingsError, match="No image processor is known"):
        pivot.assemble(tower, decoder, tokenizer=tokenizer)
    pooled = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]))
    with pytest.raises(EncoderError, match="ResNetModel cannot be read as LLaVA reads a tower"):
        pivot.assemble(pooled, decoder, tokenizer=tokenizer, image_processor=vit_processor())


QWEN = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2-tied", "qwen3_vl": "qwen3"}


@pytest.mark.training
@pytest.mark.parametrize(("family", "text"), QWEN.items())
def test_an_extracted_qwen_tower_makes_a_model_of_its_own_family(
    family: str, text: str, make: Any, tmp_path: Path
) -> None:
    source, source_processor = make(family)
    tower = find_adapter(source).extract()
    decoder, tokenizer = language_model(text)
    said = tokenizer("what is it?", return_tensors="pt")
    with torch.no_grad():
        before = decoder(**said).logits
    model, processor = pivot.assemble(
        tower, decoder, tokenizer=tokenizer, image_processor=source_processor.image_processor, seed=3
    )
    assert type(model) is type(source)
    # what the language model knew stays true
    with torch.no_grad():
        after = model(**processor.tokenizer("what is it?", return_tensors="pt")).logits
    assert torch.allclose(after[..., : before.shape[-1]], before, atol=1e-5)
    # so does what the tower saw, up to the merger, which is new
    adapter = find_adapter(model)
    inputs = source_processor.image_processor(images=[picture(56, 84, 1)], return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (find_adapter(m).patch_features(inputs)[0].values for m in (model, source))
    assert torch.equal(ours, theirs)
    # the seed decides the merger, whatever order a process gives its sets
    drawn = torch.Generator().manual_seed(3)
    for path in adapter.projector_paths:
        for module in model.get_submodule(path).modules():
            if isinstance(module, torch.nn.Linear):
                expected = torch.empty(module.weight.shape).normal_(0.0, 0.02, generator=drawn)
                assert torch.equal(module.weight, expected)
    first = model.get_submodule(adapter.projector_paths[0])
    assert all(m.bias.eq(0).all() for m in first.modules() if isinstance(m, torch.nn.Linear))
    pair = row("what?", "a cat", "a dog", picture(60, 90, 2))
    result = pivot.optimize(
        *(model, [pair] * 8),
        processor=processor,
        output_dir=tmp_path / "run",
        max_steps=1,
        use_cpu=True,
        eval_fraction=0,
        per_device_train_batch_size=4,
        save_strategy="no",
    )
    model.save_pretrained(tmp_path / "mllm")
    processor.save_pretrained(tmp_path / "mllm")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "mllm")
    for name, parameter in result.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    written = AutoProcessor.from_pretrained(tmp_path / "mllm").apply_chat_template(messages)
    assert "<|vision_start|><|image_pad|><|vision_end|>what?" in written


def test_a_qwen_tower_wants_its_family_s_language_model(make: Any) -> None:
    source, processor = make("qwen2_5_vl")
    decoder, tokenizer = language_model("llama")
    with pytest.raises(EncoderError, match="has language models of class Qwen2ForCausalLM"):
        pivot.assemble(
            *(find_adapter(source).extract(), decoder),
            tokenizer=tokenizer,
            image_processor=processor.image_processor,
        )


class OwnTower(VisionAdapter):
    """Of a plugin that knows a tower, and not what MLLM it makes."""

    family = "mine"


class OwnAssembly(OwnTower):
    """Of a plugin that knows both."""

    def assemble(self, decoder: Any, tokenizer: Any, image_processor: Any, feature_layer: int) -> Assembled | None:
        made = EncoderAdapter(self.model).assemble(decoder, tokenizer, image_processor, feature_layer)
        assert made is not None
        made.model.config.made_by = self.family
        return made


@pytest.mark.parametrize(("adapter", "made_by"), [(OwnTower, None), (OwnAssembly, "mine")])
def test_the_first_adapter_that_makes_an_mllm_of_the_encoder_does(adapter: Any, made_by: str | None) -> None:
    class Plugin:
        @hookimpl
        def pivot_adapter(self, model: Any) -> VisionAdapter | None:
            return adapter(model) if isinstance(model, SiglipVisionModel) else None

    manager().register(plugin := Plugin(), "own-tower")
    try:
        assert find_adapter(encoder("siglip")[0], encoder=True).family == "mine"
        model, _ = assembled("siglip")
    finally:
        manager().unregister(plugin)
    assert type(model) is LlavaForConditionalGeneration
    assert getattr(model.config, "made_by", None) == made_by
