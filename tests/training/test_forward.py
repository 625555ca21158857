"""Which models take trees, what happens to those that do not, and what the forest saves."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.errors import DataError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training import forest_check, forward
from pivot_plugin.training.attention import AttentionPattern, tree_attention
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forest import build_forest
from pivot_plugin.training.tree_flex import block_mask
from tests.helpers.training import normal, settings


def test_families_take_trees(tiny: Any) -> None:
    assert forward.reading_of(tiny[0]).no_trees is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_attention_that_cannot_follow_a_tree_is_recognised(make: Any, change: dict[str, Any], reason: str) -> None:
    model, _ = make("llava_onevision")
    for name, value in change.items():
        if name == "_attn_implementation":
            model.config.get_text_config()._attn_implementation_internal = value
        else:
            setattr(model.config.get_text_config(), name, value)
    assert reason in (forward.reading_of(model).no_trees or "")


@pytest.mark.training
def test_such_a_model_trains_one_sequence_a_row_with_the_same_losses(
    make: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    curves, encoded = [], []
    for name in ("trees", "rows"):
        model, processor = make("qwen3_vl")
        seen: list[int] = []
        model.model.visual.register_forward_hook(lambda _, __, out, seen=seen: seen.append(len(out.last_hidden_state)))
        if name == "rows":
            reading = forward.ForestReading({}, "its layers use linear_attention")
            monkeypatch.setattr(forest_check, "reading_of", lambda model, reading=reading: reading)
        with caplog.at_level(logging.WARNING):
            trainer = PivotTrainer(
                model,
                PivotConfig(**settings(tmp_path / name, max_steps=3)),
                rows,
                processing_class=processor,
                lora=4,
            )
        batch = trainer.data_collator(list(trainer.train_dataset))["forest"]
        seen.clear()
        trainer.model(forest=batch)
        encoded.append(seen[:])
        if name == "rows":
            assert len(batch.forest.tokens) == 2 * len(rows)
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert encoded[0] == encoded[1], "images are encoded once in either form"
    assert "one sequence per row, images still encoded once: its layers use linear_attention" in caplog.text


def test_images_and_prompts_are_computed_once(make: Any, rows: Any) -> None:
    model, processor = make("llava")
    adapter = find_adapter(model)
    batch = ForestCollator(processor, adapter.image_token_id)(normal(rows[:2]))["forest"]
    assert len(batch.image_inputs["pixel_values"]) == 1
    assert len(batch.forest.tokens) == 1, "two questions on one image are one tree"
    assert (batch.forest.tokens == adapter.image_token_id).sum() == 16
    assert batch.forest.node_count < batch.forest.sequence_token_count / 2


def test_the_head_runs_on_scored_edges_alone(make: Any, rows: Any, tmp_path: Path) -> None:
    model, processor = make("llava")
    trainer = PivotTrainer(model, PivotConfig(**settings(tmp_path)), rows, processing_class=processor, lora=4)
    from trl.trainer import utils

    scored = []
    original = utils._ChunkedLogProbFunction.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utils._ChunkedLogProbFunction,
            "apply",
            lambda states, *rest: scored.append(len(states)) or original(states, *rest),
        )
        batch = trainer.data_collator(list(trainer.train_dataset))["forest"]
        trainer.model(forest=batch)
    # common beginnings of two answers are scored once
    assert scored == [len(batch.forest.edge_token)]
    assert scored[0] < int((batch.forest.edge_of >= 0).sum())


def test_the_block_mask_is_the_dense_mask() -> None:
    forest = build_forest([[0, 1, 2], [3]], [[1, 2, 3], [1, 2, 4, 5], [1, 6], [7, 8]], [1] * 4)
    attention = tree_attention(AttentionPattern(), forest, torch.zeros_like(forest.is_node))
    dense, sparse = attention.mask(), block_mask(attention)
    found = create_mask(sparse.mask_mod, 2, 1, *dense.shape[2:], device="cpu")
    assert torch.equal(found, dense)


def test_a_max_length_that_cuts_a_prompt_is_refused_and_one_that_cuts_answers_cuts_them(make: Any, rows: Any) -> None:
    model, processor = make("llava")
    image_token = find_adapter(model).image_token_id
    pairs = normal(rows[:1])
    whole = ForestCollator(processor, image_token)(pairs)
    prompt = int((whole["forest"].forest.paths[0] >= 0).sum()) - int(whole["completion_mask"][0].sum())
    cut = ForestCollator(processor, image_token, max_length=prompt + 3)(pairs)
    assert cut["completion_mask"].sum(dim=1).tolist() == [3, 3]
    with pytest.raises(DataError, match=f"within max_length={prompt}"):
        ForestCollator(processor, image_token, max_length=prompt)(pairs)


def test_installing_twice_or_calling_plainly_changes_nothing(make: Any) -> None:
    model, processor = make("llava")
    inputs = processor(text=["hello"], return_tensors="pt")
    plain = copy.deepcopy(model)
    forward.install(model, find_adapter(model))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
