"""The reference cache: computed once, resumed, shared, and never stale."""

import copy
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.models.fingerprints import model_fingerprint, processor_fingerprint
from pivot_plugin.training import reference_pass
from pivot_plugin.training.reference import ReferenceCache
from pivot_plugin.training.reference_pass import shares
from tests.helpers.training import settings


class Counting:
    """Counts the pairs whose reference is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = PivotTrainer.compute_ref_log_probs

        def counted(trainer: Any, model: Any, inputs: Any) -> Any:
            scores = original(trainer, model, inputs)
            self.count += len(scores[0])
            return scores

        monkeypatch.setattr(PivotTrainer, "compute_ref_log_probs", counted)

    def of(self, tiny: Any, rows: Any, folder: Path, **more: Any) -> int:
        before = self.count
        self.trainer = PivotTrainer(
            copy.deepcopy(tiny[0]),
            PivotConfig(**settings(folder, **more)),
            rows,
            processing_class=tiny[1],
            lora=4,
        )
        return self.count - before


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def test_a_second_run_with_the_same_base_pays_nothing(
    llava: Any, rows: Any, counting: Counting, tmp_path: Path
) -> None:
    assert counting.of(llava, rows, tmp_path / "a") == len(rows)
    first = counting.trainer.train_dataset["ref_chosen_logps"][:]
    assert counting.of(llava, rows[::-1], tmp_path / "b", learning_rate=1.0, beta=0.5) == 0
    assert counting.trainer.train_dataset["ref_chosen_logps"][:] == first[::-1]


def test_only_what_is_new_is_computed(llava: Any, rows: Any, counting: Counting, tmp_path: Path) -> None:
    assert counting.of(llava, rows[:5], tmp_path / "a") == 5
    assert counting.of(llava, rows, tmp_path / "b") == 3


def test_cached_values_are_the_policy_s_own_before_training(
    tiny: Any, rows: Any, counting: Counting, tmp_path: Path
) -> None:
    counting.of(tiny, rows, tmp_path / "a")
    trainer = counting.trainer
    fresh = trainer.score(trainer._collator.sources[0])
    torch.testing.assert_close(
        fresh.chosen, torch.tensor(trainer.train_dataset["ref_chosen_logps"][:]), atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        fresh.rejected, torch.tensor(trainer.train_dataset["ref_rejected_logps"][:]), atol=2e-5, rtol=0
    )


def change_weight(tiny: Any, rows: Any) -> None:
    with torch.no_grad():
        tiny[0].model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


def change_template(tiny: Any, rows: Any) -> None:
    tiny[1].chat_template = tiny[1].chat_template.replace("assistant", "helper")


def change_size(tiny: Any, rows: Any) -> None:
    tiny[1].image_processor.image_mean = [0.1, 0.2, 0.3]


def change_vocabulary(tiny: Any, rows: Any) -> None:
    tiny[1].tokenizer.add_tokens(["cat"])
    tiny[0].resize_token_embeddings(len(tiny[1].tokenizer))


@pytest.mark.parametrize("change", [change_weight, change_template, change_size, change_vocabulary])
def test_a_changed_reference_misses_the_cache(
    change: Any, llava: Any, rows: Any, counting: Counting, tmp_path: Path
) -> None:
    counting.of(llava, rows, tmp_path / "a")
    change(llava, rows)
    assert counting.of(llava, rows, tmp_path / "b") == len(rows)


def test_a_changed_pair_misses_the_cache(llava: Any, rows: Any, counting: Counting, tmp_path: Path) -> None:
    counting.of(llava, rows, tmp_path / "a")
    rows[0] = {**rows[0], "prompt": "what is that?"}
    rows[1] = {**rows[1], "chosen": "there"}
    rows[6] = {**rows[6], "images": [Image.new("RGB", rows[6]["images"][0].size)]}
    assert counting.of(llava, rows, tmp_path / "b") == 3


@pytest.mark.parametrize("more", [{"max_length": 60}, {"ld_alpha": 0.5}, {"bf16": True}])
def test_a_setting_that_changes_log_probabilities_misses_the_cache(
    more: Any, llava: Any, rows: Any, counting: Counting, tmp_path: Path
) -> None:
    short = [rows[0], rows[1], rows[4]]
    counting.of(llava, short, tmp_path / "a")
    assert counting.of(llava, short, tmp_path / "b", **more) == len(short)


def test_an_interrupted_pass_keeps_what_it_computed(
    llava: Any, rows: Any, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_pass, "SECONDS_BETWEEN_PARTS", 0)
    original = PivotTrainer.compute_ref_log_probs

    def interrupted(*args: Any) -> Any:
        if counting.count >= 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PivotTrainer, "compute_ref_log_probs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            counting.of(llava, rows, tmp_path / "a", per_device_train_batch_size=2)
    assert counting.of(llava, rows, tmp_path / "b") == len(rows) - 4


def keys_of(*names: str) -> np.ndarray:
    return np.array([hashlib.sha256(name.encode()).digest() for name in names], dtype="S32")


def test_an_unfinished_part_is_not_read_and_a_damaged_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ReferenceCache(tmp_path, {"model": "a"})
    cache.add(keys_of("one"), np.array([[-1.0, -2.0]], dtype=np.float32))
    (cache.folder / ".half.arrow.123").write_bytes(b"ARROW1")
    (cache.folder / "damaged.arrow").write_bytes(b"ARROW1 and no more")
    known, logps = ReferenceCache(tmp_path, {"model": "a"}).look_up(keys_of("two", "one"))
    assert known.tolist() == [False, True] and logps[1].tolist() == [-1.0, -2.0]
    assert "damaged.arrow is left out" in caplog.text
    assert not ReferenceCache(tmp_path, {"model": "b"}).look_up(keys_of("one"))[0].any()


def test_thousands_of_pairs_of_several_passes_end_in_one_file_that_is_searched(tmp_path: Path) -> None:
    names = [str(number) for number in range(3000)]
    values = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    keys = keys_of(*names)
    for rank in range(3):
        cache = ReferenceCache(tmp_path, {})
        for start in range(rank * 1000, rank * 1000 + 1000, 100):
            cache.add(keys[start : start + 100], values[start : start + 100])
    assert len(list(cache.folder.glob("*.arrow"))) == 3
    cache.merge()
    assert len(list(cache.folder.glob("*.arrow"))) == 1
    known, logps = cache.look_up(keys[::-1])
    assert known.all() and (logps[::-1] == values).all()
    # a pass that goes on after another run has merged loses nothing
    late, later = keys_of("late", "later"), values[:1]
    cache.add(late[:1], later)
    ReferenceCache(tmp_path, {}).merge()
    cache.add(late[1:], later)
    assert cache.look_up(np.concatenate([late, keys]))[0].all()


@given(st.lists(st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e"]), max_size=40), st.integers(1, 6))
def test_shares_hold_every_pair_once_and_keep_those_of_an_image_together(keys: list[bytes], count: int) -> None:
    positions = np.arange(len(keys))
    of_ranks = shares(np.array(keys, dtype="S32"), positions, count)
    assert len(of_ranks) == count
    assert sorted(position for share in of_ranks for position in share) == positions.tolist()
    sizes = Counter(keys)
    largest = max(sizes.values(), default=0) if sizes.keys() - {b""} else 1
    for share in of_ranks:
        assert len(share) <= len(keys) / count + largest + 1
    # an image is in several shares only where it has more pairs than half a share
    for key in sizes.keys() - {b""}:
        holders = sum(any(keys[position] == key for position in share) for share in of_ranks)
        assert holders == 1 or sizes[key] * 2 > len(keys) / count


def test_fingerprints_are_stable_and_see_every_change(make: Any) -> None:
    model, processor = make("qwen2_5_vl")
    assert model_fingerprint(model) == model_fingerprint(copy.deepcopy(model))
    assert processor_fingerprint(processor) == processor_fingerprint(copy.deepcopy(processor))
    print_before = model_fingerprint(model)
    model.to(torch.bfloat16)
    assert model_fingerprint(model) != print_before
    before = processor_fingerprint(processor)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 784}
    assert processor_fingerprint(processor) != before


def test_a_model_that_was_saved_or_moved_is_the_same_one(make: Any, tmp_path: Path) -> None:
    model, _ = make("llava")
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path / "here")
    assert model_fingerprint(model) == before
    (tmp_path / "here").rename(tmp_path / "there")
    moved = type(model).from_pretrained(tmp_path / "there")
    assert model_fingerprint(moved) == before
    moved.config.vision_feature_layer = -1
    assert model_fingerprint(moved) != before


@pytest.mark.training
@pytest.mark.parametrize("lora", [4, None])
@pytest.mark.parametrize("train", ["encoder", "encoder+projector", "language_model", "all"])
def test_the_reference_does_not_move_during_training(
    llava: Any, rows: Any, train: Any, lora: Any, tmp_path: Path
) -> None:
    trainer = PivotTrainer(
        llava[0],
        PivotConfig(**settings(tmp_path, train=train, max_steps=3)),
        rows,
        processing_class=llava[1],
        lora=lora,
    )
    assert trainer.ref_model is None, "no second copy of the model is held"
    before = trainer.train_dataset["ref_chosen_logps"][:]
    policy = trainer.score(trainer._collator.sources[0]).chosen
    trainer.train()
    assert trainer.train_dataset["ref_chosen_logps"][:] == before
    assert not torch.allclose(trainer.score(trainer._collator.sources[0]).chosen, policy, atol=1e-3)


def test_a_reference_model_that_is_given_is_the_reference(make: Any, rows: Any, tmp_path: Path) -> None:
    (model, processor), (other, _) = make("llava"), make("llava")
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    alone = PivotTrainer(
        copy.deepcopy(other), PivotConfig(**settings(tmp_path / "a")), rows, processing_class=processor, lora=4
    )
    given = PivotTrainer(
        model, PivotConfig(**settings(tmp_path / "b")), rows, processing_class=processor, lora=4, ref_model=other
    )
    assert given.train_dataset["ref_chosen_logps"][:] == alone.train_dataset["ref_chosen_logps"][:]


@pytest.mark.training
def test_held_out_pairs_are_evaluated_during_training(llava: Any, rows: Any, tmp_path: Path) -> None:
    trainer = PivotTrainer(
        llava[0],
        PivotConfig(**settings(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)),
        rows[:5],
        eval_dataset=rows[5:],
        processing_class=llava[1],
        lora=4,
    )
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2
    assert {"eval_rewards/accuracies", "eval_logps/chosen", "eval_rewards/margins"} <= evaluated[0].keys()
