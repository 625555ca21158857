"""The check before training, broken on purpose: whatever differs is named before the first step, in every precision."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.forest_check import read_rows, varied_rows
from tests.helpers import picture, row

PRECISIONS = (torch.float32, torch.bfloat16)
ROWS = [
    row("say hello", "hello", "good bye"),
    row("what is it?", "a red cat", "a red dog!", picture(60, 60, 1)),
    row("where?", "here", "over there", picture(60, 60, 2)),
    row("<image>which of <image> both?", "left", "the right one", picture(120, 50, 3), picture(48, 100, 4)),
    row("and this?", "wide", "tall", picture(120, 50, 5)),
]


def read(model: Any, processor: Any, rows: list[Any] = ROWS, adapter: Any = None) -> Any:
    return read_rows(model, adapter or find_adapter(model), processor, varied_rows(PairDataset(rows)))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_every_family_reads_trees_in_every_precision(tiny: Any, precision: torch.dtype) -> None:
    model, processor = tiny
    model.to(precision)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reading = read(model, processor)
    assert (reading.no_trees, reading.own_head, reading.whole_prompts) == (None, False, False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == precision


def test_rows_of_every_kind_are_looked_at_wherever_they_stand() -> None:
    rows = [ROWS[0]] * 3 + [ROWS[1]] * 3 + ROWS[2:]
    chosen = varied_rows(PairDataset(rows))
    assert [len(one["images"]) for one in chosen] == [0, 1, 1, 2]
    sizes = [one["images"][0].size for one in chosen if len(one["images"]) == 1]
    assert sizes == [(60, 60), (120, 50)]


def test_a_stream_gives_again_what_was_looked_at() -> None:
    stream = load(one for one in ROWS)
    assert [len(one["images"]) for one in varied_rows(stream)] == [0, 1, 1, 2]
    assert [pair["prompt"][0]["content"][-1]["text"] for pair in stream][:2] == ["say hello", "what is it?"]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("wrong", ["plain depths", "one too many behind the image", "text-only first row"])
def test_wrong_positions_are_refused_whatever_row_comes_first(make: Any, wrong: str, precision: torch.dtype) -> None:
    model, processor = make("qwen2_5_vl")
    model.to(precision)
    adapter = find_adapter(model)
    right = adapter.positions

    def shifted(tokens: torch.Tensor, images: Any) -> torch.Tensor:
        positions = right(tokens, images).clone()
        last = int((tokens == adapter.image_token_id).nonzero().max()) if images else len(tokens)
        positions[..., last + 1 :] += 1
        return positions

    adapter.positions = (lambda tokens, images: None) if wrong == "plain depths" else shifted  # type: ignore
    rows = ROWS if wrong == "text-only first row" else ROWS[1:]
    with pytest.raises(ModelError, match=r"something else in training than by itself: the positions differ from token"):
        read(model, processor, rows, adapter)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("setting", [{"logit_scale": 0.25}, {"final_logit_softcapping": 0.5}], ids=str)
def test_a_head_that_trl_takes_for_another_is_the_model_s_own(
    make: Any, setting: dict[str, float], precision: torch.dtype
) -> None:
    """TRL's fused head reads these from the configuration; LLaVA's own head does not."""
    model, processor = make("llava")
    model.to(precision)
    for name, value in setting.items():
        setattr(model.config.get_text_config(), name, value)
    assert read(model, processor).own_head


def test_training_by_the_model_s_own_head_is_training_without_the_setting(
    make: Any, rows: Any, fast: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curves = []
    for scale in (None, 0.25):
        model, processor = make("llava")
        if scale is not None:
            model.config.get_text_config().logit_scale = scale
        with caplog.at_level(logging.INFO):
            result = pivot.optimize(
                model, rows, processor=processor, eval_fraction=0, **fast | {"output_dir": tmp_path / str(scale)}
            )
        curves.append([entry["loss"] for entry in result.history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert len(curves[0]) == 4
    assert "by its own head" in caplog.text


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_images_in_the_wrong_order_are_refused(make: Any, precision: torch.dtype) -> None:
    model, processor = make("llava")
    model.to(precision)
    encode = model.model.get_image_features
    calls = []

    def swapped(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        calls.append(len(outputs.pooler_output))
        if len(calls) > 8:
            # the plain passes are through: in the batch the features of two images change places
            outputs.pooler_output = outputs.pooler_output[::-1]
        return outputs

    model.model.get_image_features = swapped
    with pytest.raises(ModelError, match=r"the embedding of token \d+ of row .* is .* of its length apart"):
        read(model, processor, ROWS[1:3])


def test_flash_attention_keeps_the_forest_and_is_put_back(
    llava: Any, rows: Any, fast: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = llava
    configs = (model.config.get_text_config(), model.get_decoder().config)
    for config in configs:
        config._attn_implementation_internal = "flash_attention_2"
    with caplog.at_level(logging.INFO):
        pivot.optimize(model, rows, processor=processor, eval_fraction=0, **fast)
    assert "runs with sdpa instead of flash_attention_2" in caplog.text
    assert "one sequence per row" not in caplog.text
    assert [config._attn_implementation for config in configs] == ["flash_attention_2"] * 2
