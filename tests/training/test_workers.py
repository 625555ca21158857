"""Batches that other processes prepare: how many there are, and that they are the same batches."""

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.training.workers import default_workers
from tests.helpers.training import settings


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, None, 0), (2, None, 1), (16, None, 4), (16, "8", 1), (4, "4", 0)]
)
def test_workers_are_the_free_cores_at_most_four(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: str | None, expected: int
) -> None:
    monkeypatch.delenv("PIVOT_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_workers() == expected
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    assert default_workers() == 0, "each would load the libraries and be sent the data"
    monkeypatch.setenv("PIVOT_WORKERS", "7")
    assert default_workers() == 7


@pytest.mark.training
def test_workers_prepare_the_batches_of_the_main_process(
    make: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, references = [], []
    for workers in (0, 2):
        monkeypatch.setenv("PIVOT_WORKERS", str(workers))
        model, processor = make("qwen2_5_vl")
        torch.manual_seed(0)
        args = PivotConfig(
            **settings(tmp_path / str(workers), max_steps=4, reference_cache=str(tmp_path / f"r{workers}"))
        )
        trainer = PivotTrainer(model, args, rows, processing_class=processor, lora=4)
        assert trainer.get_train_dataloader().num_workers == workers
        references.append(trainer.train_dataset["ref_rejected_logps"][:])
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert references[0] == pytest.approx(references[1], rel=1e-6)


def test_what_the_user_says_of_workers_holds(llava: Any, rows: Any, tmp_path: Path) -> None:
    model, processor = llava
    args = PivotConfig(**settings(tmp_path, dataloader_num_workers=3))
    trainer = PivotTrainer(model, args, rows, processing_class=processor, lora=4)
    assert trainer.args.dataloader_num_workers == 3


def test_what_a_worker_is_sent_is_small(llava: Any, rows: Any, tmp_path: Path) -> None:
    model, processor = llava
    trainer = PivotTrainer(model, PivotConfig(**settings(tmp_path)), rows, processing_class=processor, lora=4)
    sent = pickle.dumps(trainer._forest_collator)
    assert len(sent) < sum(p.numel() for p in model.parameters())
    batch = pickle.loads(sent)([trainer._collator.sources[0][0]])["forest"]
    here = trainer._forest_collator([trainer._collator.sources[0][0]])["forest"]
    assert torch.equal(batch.forest.tokens, here.forest.tokens)


def test_a_stream_has_no_workers_of_itself(
    llava: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIVOT_WORKERS", "2")
    model, processor = llava
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = PivotTrainer(
        model, PivotConfig(**settings(tmp_path, max_steps=1)), stream, processing_class=processor, lora=4
    )
    assert trainer.args.dataloader_num_workers == 0


def test_scoring_draws_no_random_numbers(llava: Any, rows: Any, tmp_path: Path) -> None:
    """What training draws must not depend on whether a cache has made a pass over the pairs unnecessary."""
    model, processor = llava
    trainer = PivotTrainer(model, PivotConfig(**settings(tmp_path)), rows, processing_class=processor, lora=4)
    before = torch.get_rng_state()
    assert len(trainer.score(trainer._collator.sources[0]).chosen) == len(rows)
    assert torch.equal(torch.get_rng_state(), before)
