"""Whether a processor belongs to a model."""

from typing import Any

import pytest

from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import check_processor, find_adapter
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
