"""A batch in parts against the batch at once: losses, gradients and metrics, for every kind of mean."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.errors import SettingsError
from pivot_plugin.training.forest import build_tree
from pivot_plugin.training.micro_batches import NodeCount, check, parts_of, runs_that_fit
from tests.helpers.training import settings

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6)


@given(st.lists(sequences, min_size=1, max_size=3))
def test_nodes_are_those_of_the_trees(trees: list[list[list[int]]]) -> None:
    count = NodeCount()
    for number, of_tree in enumerate(trees):
        for sequence in of_tree:
            count.add(number, sequence)
    assert count.total == sum(len(build_tree(of_tree).tokens) for of_tree in trees)


@given(st.lists(st.tuples(st.integers(0, 2), sequences), min_size=1, max_size=6), st.integers(1, 30))
def test_runs_cover_the_pairs_in_order_and_fit(pairs: list[tuple[int, list[list[int]]]], most: int) -> None:
    images = [image for image, _ in pairs]
    given_pairs = [[(image, sequence) for sequence in of_pair] for image, of_pair in pairs]
    runs = runs_that_fit(given_pairs, images, most)
    assert [pair for run in runs for pair in range(run.start, run.stop)] == list(range(len(pairs)))
    for run in runs:
        count = NodeCount()
        for of_pair in given_pairs[run]:
            for tree, sequence in of_pair:
                count.add(tree, sequence)
        assert count.total <= most or run.stop - run.start == 1


def test_pairs_of_one_image_stay_together_where_they_fit() -> None:
    def pair(image: str, start: int) -> list[tuple[Any, list[int]]]:
        return [(image, [0] * 10 + [start]), (image, [0] * 10 + [start + 1])]

    pairs = [pair("a", 1), pair("b", 1), pair("b", 3), pair("c", 1)]
    assert runs_that_fit(pairs, ["a", "b", "b", "c"], 24) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert runs_that_fit(pairs, ["a", "b", "b", "c"], 12) == [slice(n, n + 1) for n in range(4)]
    assert runs_that_fit(pairs, ["a", "b", "b", "c"], 1000) == [slice(0, 4)]


@pytest.mark.parametrize(
    ("losses", "processes", "balances", "problem"),
    [
        (["sigmoid", "aot"], 1, False, "the loss 'aot' compares the pairs of a batch"),
        (["sigmoid"], 2, False, "2 processes train"),
        (["sigmoid"], 1, True, "balance of experts"),
    ],
)
def test_what_needs_the_batch_as_a_whole_is_refused(
    losses: list[str], processes: int, balances: bool, problem: str
) -> None:
    check(losses, None, processes, balances)
    check(["sigmoid", "sft"], 99, 1, False)
    with pytest.raises(SettingsError, match=problem):
        check(losses, 99, processes, balances)


def trainer_of(tiny: Any, rows: Any, folder: Path, **more: Any) -> PivotTrainer:
    model, processor = copy.deepcopy(tiny)
    torch.manual_seed(0)
    trainer = PivotTrainer(model, PivotConfig(**settings(folder, **more)), rows, processing_class=processor, lora=4)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            # away from the start, where policy and reference are equal
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llava", {"loss_type": ["sigmoid", "sft", "bco_pair"]}),
        ("llava", {"loss_type": ["sigmoid", "sft"], "sft_average": "sequence"}),
        ("llava", {"loss_type": ["ipo"], "use_weighting": True}),
        ("qwen2_5_vl", {"loss_type": ["sigmoid", "sft"]}),
        ("llava_next", {"loss_type": ["sigmoid", "sft"]}),
    ],
    ids=str,
    indirect=["family"],
)
def test_loss_gradients_and_metrics_of_parts_are_those_of_the_whole(
    tiny: Any, rows: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    losses, gradients, metrics, evaluated = [], [], [], []
    for most in (None, 60):
        trainer = trainer_of(tiny, rows, tmp_path / str(most), max_nodes=most, **more)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator(list(trainer.train_dataset))
        parts = parts_of(batch)
        assert (len(parts) > 2) == (most is not None)
        if most:
            counts = [part["forest"].forest.node_count for part in parts]
            assert all(
                count <= most or len(part["forest"].pair_ids) == 1 for count, part in zip(counts, parts, strict=True)
            )
        (batch,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        losses.append(trainer.training_step(trainer.model, batch, items))
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
        metrics.append({name: values for name, values in trainer._metrics["train"].items() if name != "num_tokens"})
        trainer.model.eval()
        with torch.no_grad():
            evaluated.append(trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluated[1], evaluated[0], rtol=1e-5, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in gradients[0])
    for whole, of_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(of_parts, whole, rtol=1e-4, atol=1e-5 * scale)
    assert metrics[1] == {name: pytest.approx(values, rel=1e-4, abs=1e-5) for name, values in metrics[0].items()}


@pytest.mark.training
def test_a_run_in_parts_is_the_run(llava: Any, rows: Any, tmp_path: Path) -> None:
    curves, references, evaluated = [], [], []
    for most in (None, 50):
        trainer = trainer_of(
            llava,
            rows,
            tmp_path / str(most),
            max_nodes=most,
            max_steps=3,
            loss_type=["sigmoid", "sft"],
            reference_cache=str(tmp_path / f"r{most}"),
            # a batch of seven pairs and one of a single pair
            per_device_eval_batch_size=7,
        )
        evaluated.append(trainer.evaluate(rows)["eval_loss"])
        references.append(trainer.train_dataset["ref_chosen_logps"][:])
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)
    assert references[1] == pytest.approx(references[0], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "problem"),
    [({"max_nodes": 0}, "max_nodes is 0"), ({"max_nodes": 99, "loss_type": "aot"}, "compares the pairs of a batch")],
)
def test_what_cannot_be_split_is_refused(
    llava: Any, rows: Any, more: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=problem):
        trainer_of(llava, rows, tmp_path, **more)
