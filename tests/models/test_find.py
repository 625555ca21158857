"""Whether a model can be served, and whether its processor and its tower belong to it."""

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import check_processor, check_tower, find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.testing import zoo


def test_a_marker_that_is_another_token_than_the_model_s_belongs_if_it_becomes_that() -> None:
    model, processor = zoo.build("gemma3")
    adapter = find_adapter(model)
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) != adapter.image_token_id
    check_processor(model, processor, adapter)


def test_a_processor_of_another_family_is_refused(llava: Any) -> None:
    model, _ = llava
    _, processor = zoo.build("gemma3")
    with pytest.raises(ModelError, match="Gemma3Processor does not belong to LlavaForConditionalGeneration"):
        check_processor(model, processor, find_adapter(model))


def test_a_processor_that_needs_a_missing_package_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = zoo.build("gemma3")

    def needs(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'num2words'", name="num2words")

    monkeypatch.setattr(type(processor), "__call__", needs)
    with pytest.raises(ModelError, match=r"Gemma3Processor needs num2words.*pip install num2words"):
        check_processor(model, processor, find_adapter(model))


def test_a_processor_that_cannot_be_loaded_without_a_package_names_it(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = llava
    monkeypatch.setattr(model, "name_or_path", "some/model")

    def needs(name: str, **options: object) -> None:
        raise ImportError("`num2words` is required to run SmolVLM processor")

    monkeypatch.setattr("pivot_plugin.models.loading.AutoProcessor.from_pretrained", needs)
    with pytest.raises(ModelError, match=r"The processor of 'some/model' needs a package.*num2words"):
        load_model(model)


def test_a_family_that_nobody_knows_is_refused_by_name() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=16)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no vision tower.*install a plugin"):
        find_adapter(GPT2LMHeadModel(config))
    with pytest.raises(ModelError, match="The model is a Linear, not a transformers PreTrainedModel"):
        find_adapter(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_model_without_image_token_is_refused(llava: Any) -> None:
    model, _ = llava
    model.config.image_token_id = None
    with pytest.raises(ModelError, match="has no image token"):
        find_adapter(model)


@pytest.mark.parametrize("of_tokenizer", [True, False])
def test_an_image_token_outside_of_the_vocabulary_is_refused(llava: Any, of_tokenizer: bool) -> None:
    model, processor = llava
    outside = model.get_input_embeddings().num_embeddings
    if of_tokenizer:
        # the model was not resized when the token was added
        processor.tokenizer.add_tokens([f"<more{number}>" for number in range(outside)])
        message = f"has {len(processor.tokenizer)} tokens, LlavaForConditionalGeneration embeds only {outside}"
    else:
        model.config.image_token_id = outside
        message = f"the model's is {outside}, and it makes none of these of a picture"
    with pytest.raises(ModelError, match=message):
        check_processor(model, processor, find_adapter(model))


def test_a_second_tower_is_named_and_not_trained() -> None:
    adapter = find_adapter(zoo.build("deepseek_vl_hybrid")[0])
    assert adapter.other_tower_paths == ("model.high_res_vision_model",)
    assert not [name for name in adapter.lora_targets() if name.startswith(adapter.other_tower_paths[0])]


def test_a_tower_that_two_models_share_is_refused_until_each_has_its_own(make: Any) -> None:
    (model, _), (other, _) = make("llava"), make("llava")
    check_tower(find_adapter(model))
    other.model.vision_tower = model.model.vision_tower
    with pytest.raises(ModelError, match=r"vision tower of this LlavaForConditionalGeneration is shared: a LlavaModel"):
        check_tower(find_adapter(model))
    other.model.vision_tower = copy.deepcopy(model.model.vision_tower)
    check_tower(find_adapter(model))


def test_a_model_that_shared_its_tower_and_is_gone_is_in_nobody_s_way(make: Any) -> None:
    (model, _), (other, _) = make("llava"), make("llava")
    other.model.vision_tower = model.model.vision_tower
    # a cycle, which only the collector ends
    other.itself = [other]
    del other
    check_tower(find_adapter(model))
