"""The forest against TRL's own DPOTrainer and against separate forward passes, for every family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import add_fused_lm_head

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import FAMILIES
from pivot_plugin.training import forward
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.plan import plan
from tests.helpers.training import normal, settings


def plain(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: copy.deepcopy(pair[name]) for name in ("images", "prompt", "chosen", "rejected")} for pair in pairs]


def trl_trainer(tiny: Any, rows: list[dict[str, Any]], folder: Path, **more: Any) -> DPOTrainer:
    """What a user writes without us: TRL's trainer, LoRA targets given by hand."""
    model, processor = tiny
    lora = plan(find_adapter(model), "encoder", 4).lora
    args = DPOConfig(remove_unused_columns=False, **settings(folder, **more))
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"images": [[]], "prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        processing_class=processor,
        peft_config=lora,
    )
    trainer.train_dataset = _Listed(plain(normal(rows)))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


class _Listed(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self.items[index])


def pivot_trainer(tiny: Any, rows: list[dict[str, Any]], folder: Path, **more: Any) -> PivotTrainer:
    model, processor = tiny
    trainer = PivotTrainer(
        model=model,
        args=PivotConfig(**settings(folder, **more)),
        train_dataset=rows,
        processing_class=processor,
        lora=4,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


@pytest.mark.parametrize("tree", [True, False], ids=["trees", "rows"])
def test_log_probabilities_equal_separate_unpadded_forward_passes(
    tiny: Any, rows: list[dict[str, Any]], tree: bool
) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    add_fused_lm_head(model)
    pairs = normal(rows)
    expected = []
    for side in (0, 1):
        for pair in plain(pairs):
            batch = DataCollatorForVisionPreference(processor)([copy.deepcopy(pair)])
            mask = batch["completion_mask"][side].bool()
            keep = batch["attention_mask"][side].bool()
            text = {
                name: batch[name][side : side + 1, keep] for name in ("input_ids", "mm_token_type_ids") if name in batch
            }
            images = {}
            if pair["images"]:
                alone = processor(
                    images=[pair["images"]], text=[processor.image_token * len(pair["images"])], return_tensors="pt"
                )
                text_names = ("input_ids", "attention_mask", "mm_token_type_ids")
                images = {name: value for name, value in alone.items() if name not in text_names}
            with torch.no_grad():
                logits = model(**text, **images).logits[0].log_softmax(-1)
            ids = text["input_ids"][0]
            scores = logits[:-1].gather(1, ids[1:, None])[:, 0]
            # summed in double: at -90 a float32 sum alone is off by 1e-5
            expected.append(scores[mask[keep][1:]].double().sum())
    forward.install(model, adapter)
    batch = ForestCollator(processor, adapter.image_token_id, "images" if tree else "all")(pairs)
    with torch.no_grad():
        found = model(forest=batch["forest"]).log_probs.double().sum(dim=1)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tree", [True, False], ids=["trees", "rows"])
def test_loss_and_gradients_equal_trl(tiny: Any, rows: list[dict[str, Any]], tree: bool, tmp_path: Path) -> None:
    targets = find_adapter(tiny[0]).lora_targets()
    reference = trl_trainer(copy.deepcopy(tiny), rows, tmp_path / "trl", loss_type=["sigmoid", "sft", "bco_pair"])
    ours = pivot_trainer(tiny, rows, tmp_path / "ours", loss_type=["sigmoid", "sft", "bco_pair"])
    ours._collator.collator.tree = tree
    ours.model.load_state_dict(reference.model.state_dict())
    expected = reference._compute_loss(
        reference.model, DataCollatorForVisionPreference(tiny[1])(plain(normal(rows))), False
    )
    expected.backward()
    # cached references, computed in other batches, against TRL's own second pass
    found = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    gradients = dict(reference.model.named_parameters())
    scale = max(p.grad.abs().max() for p in gradients.values() if p.grad is not None)
    compared = 0
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            compared += 1
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4 * scale.item())
    assert compared == 2 * len(targets)


@pytest.mark.training
# without checkpointing loss and gradients of a step are compared for every family above
@pytest.mark.parametrize(("family", "checkpointing"), [*((family, True) for family in FAMILIES), ("llava", False)])
def test_five_steps_give_the_loss_curve_of_trl(
    tiny: Any, rows: list[dict[str, Any]], checkpointing: bool, tmp_path: Path
) -> None:
    more = {"max_steps": 5, "gradient_checkpointing": checkpointing}
    reference = trl_trainer(copy.deepcopy(tiny), rows, tmp_path / "trl", **more)
    ours = pivot_trainer(tiny, rows, tmp_path / "ours", **more)
    ours.model.load_state_dict(reference.model.state_dict())
    reference.train()
    ours.train()
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "rewards/accuracies", "entropy"):
        curves = [[log[name] for log in t.state.log_history if name in log] for t in (ours, reference)]
        assert len(curves[0]) == 5
        # policy and reference are equal at the first step, and on the one pair of a batch that has no image: which of
        # two equal rewards is larger is rounding
        first, rounding = (1, 0.25) if name == "rewards/accuracies" else (0, 0)
        assert curves[0][first:] == pytest.approx(curves[1][first:], rel=1e-4, abs=2e-4 + rounding), name


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": kind}
        for kind in ("hinge", "ipo", "nca_pair", "robust", "sppo_hard", "aot", "apo_zero", "discopop", "sigmoid_norm")
    ]
    + [
        {"loss_type": "apo_down"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ]
    + [{"loss_type": "exo_pair", "label_smoothing": 1e-3}, {"ld_alpha": 0.5}, {"use_weighting": True}],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_every_loss_type_of_trl_keeps_its_value(
    llava: Any, rows: list[dict[str, Any]], more: dict[str, Any], tmp_path: Path
) -> None:
    reference = trl_trainer(copy.deepcopy(llava), rows, tmp_path / "trl", **more)
    ours = pivot_trainer(llava, rows, tmp_path / "ours", **more)
    reference.model.train()
    ours.model.train()
    # away from the start, where policy and reference are equal and most losses are constants
    torch.manual_seed(0)
    for name, parameter in reference.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ours.model.load_state_dict(reference.model.state_dict())
    with torch.no_grad():
        expected = reference._compute_loss(
            reference.model, DataCollatorForVisionPreference(llava[1])(plain(normal(rows))), False
        )
        found = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert {k: v for k, v in ours._metrics["train"].items() if k != "num_tokens"} == {
        k: pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in reference._metrics["train"].items() if k != "num_tokens"
    }


@pytest.mark.training
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"]], ids="+".join)
def test_accumulating_eight_pairs_equals_one_batch_of_eight(
    loss_type: list[str], make: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    curves = []
    for size, accumulation in ((8, 1), (1, 8)):
        trainer = pivot_trainer(
            make("llava"),
            rows,
            tmp_path / str(size),
            loss_type=loss_type,
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_bfloat16_stays_near_float32(tiny: Any, rows: list[dict[str, Any]]) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    add_fused_lm_head(model)
    forward.install(model, adapter)
    batch = ForestCollator(processor, adapter.image_token_id)(normal(rows))["forest"]
    with torch.no_grad():
        exact = model(forest=batch).log_probs.sum(dim=1)
        rough = model.to(torch.bfloat16)(forest=batch).log_probs.float().sum(dim=1)
    # eight bits of mantissa over answers of up to 15 tokens
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0.5)


def test_eager_attention_takes_the_same_tree(make: Any, rows: list[dict[str, Any]]) -> None:
    results = []
    for kind in ("sdpa", "eager"):
        model, processor = make("llava")
        model.set_attn_implementation(kind)
        adapter = find_adapter(model)
        add_fused_lm_head(model)
        forward.install(model, adapter)
        with torch.no_grad():
            batch = ForestCollator(processor, adapter.image_token_id)(normal(rows))
            results.append(model(forest=batch["forest"]).log_probs)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
