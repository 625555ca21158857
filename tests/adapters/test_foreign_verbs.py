"""Everything that takes a model takes a folder of another repository."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pivot_plugin as pivot
from pivot_plugin import hooks
from pivot_plugin.errors import ModelError
from pivot_plugin.models.loading import empty_model, load_model
from pivot_plugin.probes.subjects import subject
from pivot_plugin.training.inspection import inspect_model
from tests.helpers import repositories as repo
from tests.helpers.foreign import internvl_made, llava_made, object_of


@pytest.fixture(params=["LLaVA", "LLaVA-NeXT", "InternVL"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of each repository in turn."""
    if request.param == "InternVL":
        return internvl_made(tmp_path, "InternLM2, normed queries, layer -2")[1]
    return llava_made(tmp_path, "llama, CLIP" if request.param == "LLaVA" else "qwen, tiles with a limit")[1]


def test_optimize_and_the_encoder_it_leaves(folder: Path, rows: Any, fast: Any, tmp_path: Path) -> None:
    result = pivot.optimize(str(folder), rows, **fast)
    encoder = pivot.load_encoder(fast["output_dir"] / "encoder")
    assert all(map(torch.equal, encoder.state_dict().values(), result.encoder.state_dict().values()))
    # and grafted into the untouched checkpoint it is the trained tower
    model, _ = load_model(folder, None)
    pivot.graft(model, encoder)
    theirs, ours = (m.get_encoder(modality="image").state_dict() for m in (model, result.model))
    assert all(map(torch.equal, theirs.values(), ours.values()))


def conversations(rows: Any) -> list[dict[str, Any]]:
    return [
        {
            "images": row["images"],
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
        }
        for row in rows
        if len(row["images"]) == 1
    ]


@pytest.mark.training
def test_instruct_writes_a_model_that_loads_alone(folder: Path, tmp_path: Path, rows: Any) -> None:
    data = conversations(rows)
    result = pivot.instruct(
        str(folder), data, output_dir=tmp_path / "run", eval_fraction=0, max_steps=2, use_cpu=True, disable_tqdm=True
    )
    again, _ = load_model(tmp_path / "run" / "model", None)
    assert type(again) is type(result.model)


@pytest.mark.training
def test_instruct_trains_the_projector_of_an_object_in_place(rows: Any, tmp_path: Path) -> None:
    theirs, tokens, apart = object_of("InternVL, InternLM2")
    settings = {"train": "encoder+projector", "lora": 4, "eval_fraction": 0, "max_steps": 2, "use_cpu": True}
    before = theirs.mlp1[1].weight.clone()
    result = pivot.instruct(
        theirs, conversations(rows), processor=tokens, output_dir=tmp_path / "run", disable_tqdm=True, **settings
    )
    assert not torch.equal(theirs.mlp1[1].weight, before)
    assert apart(theirs, result.model, result.processor, (120, 50)) < 1e-6


def test_a_subject_is_made_of_it(folder: Path) -> None:
    made = subject(folder)
    assert made.adapter.family in ("internvl", "llava", "llava-onevision")


@pytest.mark.parametrize("kind", ["LLaVA, CLIP", "InternVL, Qwen2"])
def test_a_subject_is_made_of_an_object(kind: str) -> None:
    theirs, tokens, _ = object_of(kind)
    assert subject(theirs, tokens).adapter.family in ("internvl", "llava")


def test_inspect_sees_its_structure_without_weights(folder: Path) -> None:
    facts = inspect_model(str(folder))
    assert facts["model"].endswith("ForConditionalGeneration")
    assert all(count.split()[0].isdigit() for count in facts["image tokens"])
    assert facts["prefix forest"] == "yes"


class Plugin:
    """A plugin registered for one test."""

    @staticmethod
    @hooks.hookimpl
    def pivot_model(source: object) -> Any:
        if str(source).startswith("mine:"):
            return repo.tokenizer(), None
        return None


def test_an_answer_of_another_kind_is_refused() -> None:
    hooks.manager().register(Plugin(), "odd")
    try:
        with pytest.raises(ModelError, match="answered pivot_model with a tuple"):
            load_model("mine:1", None)
        with pytest.raises(ModelError, match="answered pivot_model with a tuple"):
            empty_model("mine:1")
    finally:
        hooks.manager().unregister(name="odd")
