"""Plugins: found by entry point, asked newest first, isolated from each other, named when they fail."""

import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

import pivot_plugin as pivot
from pivot_plugin import hooks
from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.errors import ModelError, PluginError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.training.pair_trainer import PivotTrainer
from tests.helpers import processes

ROOT = Path(__file__).parents[2]


def distribution(folder: Path, name: str, entries: dict[str, str], **modules: str) -> None:
    """Write an installed distribution: modules, and metadata with entry points."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [f"{entry} = {module}" for entry, module in entries.items()]
    (info / "entry_points.txt").write_text("[pivot_plugin]\n" + "\n".join(lines) + "\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))


def python(code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    return processes.python(textwrap.dedent(code), folder=folders[0], PYTHONPATH=path, **variables)


LIST = """
    import json
    from dataclasses import asdict
    from pivot_plugin import hooks
    print(json.dumps([asdict(info) for info in hooks.installed()]))
"""
GOOD = """
    from pivot_plugin.hooks import hookimpl

    @hookimpl
    def pivot_rewards():
        return {"good": len}
"""


def test_a_broken_plugin_is_named_and_the_others_load(tmp_path: Path) -> None:
    distribution(tmp_path, "a-broken", {"broken": "a_broken"}, a_broken="import nothing_of_that_name")
    distribution(tmp_path, "b-misspelt", {"misspelt": "b_misspelt"}, b_misspelt=GOOD.replace("rewards()", "rewardz()"))
    distribution(tmp_path, "c-good", {"good": "c_good"}, c_good=GOOD)
    distribution(tmp_path, "d-twin", {"good": "d_twin"}, d_twin=GOOD)
    run = python(LIST, tmp_path)
    found = {(info["name"], info["distribution"]): info for info in json.loads(run.stdout)}
    assert found["good", "c-good"]["hooks"] == ["pivot_rewards"]
    assert "nothing_of_that_name" in found["broken", "a-broken"]["problem"]
    assert "pivot_rewardz" in found["misspelt", "b-misspelt"]["problem"]
    assert "taken by a plugin of c-good" in found["good", "d-twin"]["problem"]
    assert "a-broken 1.2" in run.stderr
    assert {"llava", "qwen-vl", "internvl", "generic"} <= {name for name, _ in found}


def test_plugins_can_be_left_out_by_name(tmp_path: Path) -> None:
    distribution(tmp_path, "c-good", {"good": "c_good"}, c_good=GOOD)
    run = python(LIST, tmp_path, PIVOT_DISABLE_PLUGINS="good, internvl")
    problems = {info["name"]: info["problem"] for info in json.loads(run.stdout)}
    assert problems["good"] == problems["internvl"] == "disabled by PIVOT_DISABLE_PLUGINS"
    assert problems["llava"] is None


class Plugin:
    """A plugin registered for one test."""

    def __init__(self, **implementations: Any) -> None:
        for name, function in implementations.items():
            setattr(self, name, hooks.hookimpl(function))


@pytest.fixture
def register() -> Any:
    names = []

    def add(name: str, **implementations: Any) -> None:
        hooks.manager().register(Plugin(**implementations), name)
        names.append(name)

    yield add
    for name in names:
        hooks.manager().unregister(name=name)


def test_a_user_adapter_wins_over_a_built_in_one(llava: Any, register: Any) -> None:
    class Mine(VisionAdapter):
        family = "mine"

    assert find_adapter(llava[0]).family == "llava"
    register("mine", pivot_adapter=lambda model: Mine(model))
    assert find_adapter(llava[0]).family == "mine"


def test_an_adapter_that_raises_is_named_and_the_model_is_untouched(
    llava: Any, rows: Any, fast: Any, register: Any
) -> None:
    def broken(model: Any) -> None:
        raise ZeroDivisionError("no luck")

    register("unlucky", pivot_adapter=broken)
    with pytest.raises(PluginError, match=r"'unlucky'.*ZeroDivisionError in pivot_adapter: no luck.*PIVOT_DISABLE"):
        pivot.optimize(llava[0], rows, processor=llava[1], **fast)
    assert "forward" not in llava[0].__dict__


def test_an_adapter_of_the_wrong_type_is_refused(llava: Any, register: Any) -> None:
    register("odd", pivot_adapter=lambda model: False)
    with pytest.raises(ModelError, match="answered pivot_adapter with a bool"):
        find_adapter(llava[0])


def test_a_notified_plugin_that_raises_does_not_lose_the_run(
    llava: Any, rows: Any, fast: Any, register: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = []

    def fails(result: Any) -> None:
        raise RuntimeError("cannot send mail")

    register("listener", pivot_run_finished=lambda result: told.append(result.family))
    register("mailer", pivot_run_finished=fails, pivot_run_started=lambda run: told.append(run.output_dir))
    result = pivot.optimize(llava[0], rows, processor=llava[1], eval_fraction=0, **fast)
    assert told == [result.output_dir, "llava"]
    assert "'mailer'" in caplog.text
    assert "cannot send mail" in caplog.text


def test_a_plugin_layout_says_what_is_trained_on(
    llava: Any, fast: Any, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layout(columns: list[str]) -> Any:
        if "ask" in columns:
            return lambda row: {"prompt": row["ask"], "chosen": row["good"], "rejected": row["bad"]}
        return None

    register("layout", pivot_preference_layout=layout)
    # prompts of different first letters, so that none is cut in two by what its tree shares
    questions = {"a greeting?": "hello", "by day?": "good day", "casual?": "how are you"}
    pairs = [{"ask": question, "good": answer, "bad": "bye"} for question, answer in questions.items()]
    prompts, chosen, rejected = [], set(), set()
    original = PivotTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        decode = llava[1].tokenizer.decode
        prompts.append(decode(inputs["forest"].forest.tokens.flatten()))
        completions = [
            decode(ids[mask.bool()], skip_special_tokens=True).strip()
            for ids, mask in zip(inputs["input_ids"], inputs["completion_mask"], strict=True)
        ]
        chosen.update(completions[: len(completions) // 2])
        rejected.update(completions[len(completions) // 2 :])
        return original(self, model, inputs, *more, **options)

    monkeypatch.setattr(PivotTrainer, "compute_loss", watched)
    pivot.optimize(llava[0], pairs, processor=llava[1], eval_fraction=0, train="all", **fast)
    assert (chosen, rejected) == (set(questions.values()), {"bye"})
    assert len(prompts) == 4
    assert all(question in prompt for prompt in prompts for question in questions)


def test_collected_answers_come_in_order_of_registration(register: Any) -> None:
    register("first", pivot_rewards=lambda: {"a": 1})
    register("second", pivot_rewards=lambda: {"a": 2})
    assert hooks.collect("pivot_rewards")[-2:] == [("first", {"a": 1}), ("second", {"a": 2})]
