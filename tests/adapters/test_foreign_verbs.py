"""Everything that takes a model takes a folder of another repository."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import pivot_plugin as pivot
from pivot_plugin import hooks
from pivot_plugin.encoders import extract
from pivot_plugin.errors import ModelError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model, load_model
from pivot_plugin.preferences import sample
from pivot_plugin.probes import ProbeTask
from pivot_plugin.probes.subjects import subject
from pivot_plugin.training.inspection import inspect_model
from tests.helpers import picture
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


OBJECTS = ["LLaVA, CLIP", "LLaVA, own SigLIP, tiles", "InternVL, Qwen2", "InternVL, InternLM2"]


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_encoder_of_an_object_comes_out_and_goes_in(kind: str, tmp_path: Path) -> None:
    theirs, tokens, apart = object_of(kind)
    encoder = pivot.extract_encoder(theirs, processor=tokens)
    taken = extract(theirs, tmp_path / "encoder", processor=tokens)
    assert all(map(torch.equal, taken.encoder.state_dict().values(), encoder.state_dict().values()))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    before, _ = load_model(theirs, tokens)
    assert all(map(torch.equal, tower(before).values(), taken.encoder.state_dict().values()))
    model = pivot.graft(theirs, encoder, processor=tokens)
    # the object itself has it
    assert all(map(torch.equal, tower(load_model(theirs, tokens)[0]).values(), encoder.state_dict().values()))
    assert apart(theirs, model, load_model(theirs, tokens)[1], (120, 50)) < 1e-6


class Copying:
    """A plugin whose model shares nothing with the object it is made of."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @hooks.hookimpl
    def pivot_model(self, source: Any) -> Any:
        if not isinstance(source, Wrapper):
            return None
        model = copy.deepcopy(source.inner)
        model.__dict__["made_of"] = source
        return model, self.processor

    @hooks.hookimpl
    def pivot_model_trained(self, model: Any) -> None:
        if isinstance(origin := getattr(model, "made_of", None), Wrapper):
            origin.inner.load_state_dict(model.state_dict())


class Wrapper(torch.nn.Module):
    """An object of a repository that only a plugin knows."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


def test_a_graft_reaches_the_object_behind_a_plugins_copy(llava: Any) -> None:
    model, processor = llava
    theirs = Wrapper(model)
    encoder = pivot.extract_encoder(model)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    hooks.manager().register(Copying(processor), "copying")
    try:
        pivot.graft(theirs, encoder)
    finally:
        hooks.manager().unregister(name="copying")
    assert all(map(torch.equal, tower(theirs.inner).values(), encoder.state_dict().values()))


def tower(model: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = find_adapter(model).tower.state_dict()
    return state


def test_a_new_projector_in_an_object_is_refused() -> None:
    theirs, tokens, _ = object_of("InternVL, Qwen2")
    encoder = pivot.extract_encoder(theirs, processor=tokens)
    with pytest.raises(SettingsError, match="the object it was made of would not have them"):
        pivot.graft(theirs, encoder, "new", processor=tokens)


QUESTIONS = [{"image": picture(60, 60, 1), "prompt": "what is it?", "answer": "a cat"}]


@pytest.mark.parametrize("kind", OBJECTS[1:3])
def test_answers_are_sampled_from_an_object_as_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    theirs, tokens, _ = object_of(kind)
    folder = repo.write(tmp_path / "checkpoint", settings_of(theirs, tmp_path), repo.stored(theirs), tokens)
    model, processor = load_model(folder)
    options = {"n": 2, "max_new_tokens": 4, "seed": 3}
    one, other = (list(sample(m, QUESTIONS, processor=p, **options)) for m, p in ((theirs, tokens), (model, processor)))
    assert one[0]["completions"] == other[0]["completions"]
    assert any(one[0]["completions"])


def settings_of(theirs: Any, tmp_path: Path) -> dict[str, Any]:
    settings = dict(theirs.config.to_dict())
    if "mm_vision_tower" in settings:
        settings |= {"mm_vision_tower": str(repo.write_tower(tmp_path / "siglip-tower", "siglip"))}
        settings |= {"architectures": [type(theirs).__name__]}
    return settings


def test_probes_and_questions_are_put_to_it_and_to_its_encoder(folder: Path, tmp_path: Path) -> None:
    pictures = [{"image": picture(60, 60, seed), "label": seed % 2} for seed in range(12)]
    vqa = ProbeTask("vqa", QUESTIONS, {"rewards": "accuracy", "max_new_tokens": 4})
    extract(folder, tmp_path / "encoder")
    probes = {"prototype": Dataset.from_list(pictures), "vqa": vqa}
    comparison = pivot.compare([folder, tmp_path / "encoder"], probes, mllm=folder)
    whole, alone = comparison.results.values()
    # grafted into the checkpoint it came from, an encoder scores as the checkpoint does
    for label in probes:
        one, other = ({name: score.value for name, score in of[label].scores.items()} for of in (whole, alone))
        assert one == other
    assert {"prototype", "vqa"} == whole.keys()


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
