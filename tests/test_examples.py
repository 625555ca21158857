"""The examples run as they stand."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

from pivot_plugin.testing import build, conformance, zoo
from tests.helpers import picture
from tests.helpers.processes import python, script

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def installed_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder examples/own_adapter, installed as a distribution of its own."""
    source, target = tmp_path_factory.mktemp("own_adapter"), tmp_path_factory.mktemp("site")
    for file in (EXAMPLES / "own_adapter").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(target), str(source)], check=True, capture_output=True)
    return target


def run(code: str, *paths: Path, folder: Path) -> str:
    done = python(code, folder=folder, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_adapter_is_under_sixty_lines() -> None:
    files = [EXAMPLES / "own_adapter" / name for name in ("pyproject.toml", "pivot_vipllava.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 60


def test_own_adapter_is_found_by_entry_point_and_wins(installed_adapter: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['pivot', 'adapters', '--json']; from pivot_plugin.cli import main; main()"
    first = json.loads(run(code, installed_adapter, folder=tmp_path))[0]
    assert first == {
        "name": "vipllava",
        "distribution": "pivot-vipllava",
        "version": "0.1.0",
        "hooks": ["pivot_adapter"],
        "problem": None,
    }


@pytest.mark.slow
def test_own_adapter_keeps_every_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_adapter"))
    model, processor = zoo.build("vipllava")
    checks = conformance(model, processor, import_module("pivot_vipllava").VipLlavaAdapter(model))
    assert {(check.name, check.result, check.reason) for check in checks if check.result != "passed"} == set()
    assert len(checks) == 10


@pytest.mark.slow
def test_the_test_of_own_adapter_runs_as_it_stands(installed_adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pytest; "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', {str(EXAMPLES / 'own_adapter/test_vipllava.py')!r}]))"
    )
    assert "10 passed" in run(code, installed_adapter, folder=tmp_path)


@pytest.mark.training
def test_own_adapter_trains_its_family(installed_adapter: Path, tmp_path: Path) -> None:
    llava, processor = build("llava")
    config = llava.config
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=CLIPVisionConfig(**{**config.vision_config.to_dict(), "num_hidden_layers": 4}),
            text_config=LlamaConfig(**config.text_config.to_dict()),
            image_token_id=config.image_token_id,
            vision_feature_layers=[-2, 1],
            image_seq_length=16,
        )
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(40, 40, 1).save(tmp_path / "image.png")
    pair = {"image": "image.png", "prompt": "what?", "chosen": "this", "rejected": "that"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    code = """
import pivot_plugin as pivot
result = pivot.optimize(
    "model", "pairs.jsonl", output_dir="run", lora=4, max_steps=2, learning_rate=1e-2, use_cpu=True, disable_tqdm=True
)
changes = list(result.weight_change.values())
print(result.family, [change > 0 for change in changes])
"""
    out = run(code, installed_adapter, folder=tmp_path)
    # blocks 0 to 2 feed layers -2 and 1; the fourth feeds nothing
    assert out.splitlines()[-1].startswith("vipllava")
    assert out.count("True") == 3
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


@pytest.mark.training
def test_the_trl_example_runs_on_a_local_model(tmp_path: Path) -> None:
    model, processor = build("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "prefs").mkdir()
    picture(60, 60, 1).save(tmp_path / "prefs" / "a.png")
    pair = {"image": "a.png", "prompt": "what?", "chosen": "this", "rejected": "that"}
    (tmp_path / "prefs" / "pairs.jsonl").write_text(json.dumps(pair))
    done = script(EXAMPLES / "with_trl.py", "model", "prefs", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "with-trl" / "encoder" / "pivot.json").exists()


@pytest.mark.training
@pytest.mark.parametrize(
    ("name", "family", "out", "encoder"),
    [
        ("own_answers_qwen_vl.py", "qwen2_5_vl", "qwen-pivot", "qwen-encoder"),
        ("grpo_internvl.py", "internvl", "internvl-pivot", "internvl-encoder"),
    ],
)
def test_a_script_of_questions_runs_on_a_local_model(
    name: str, family: str, out: str, encoder: str, tmp_path: Path
) -> None:
    model, processor = build(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    # a reward that random answers do not all get alike, and short roll-outs: what the tiny model can do
    code = (EXAMPLES / name).read_text()
    for long, short in (
        ('rewards=["normalised_match"]', "rewards=[first_letter]"),
        ('rewards=["accuracy", "format"]', "rewards=[first_letter]"),
        ("max_new_tokens=32", "max_new_tokens=4"),
        ("num_train_epochs=1", "max_steps=1, use_cpu=True"),
        ("max_completion_length=256", "max_completion_length=4, use_cpu=True"),
        ("max_steps=200", "max_steps=1"),
    ):
        code = code.replace(long, short)
    reward = """
def first_letter(prompts, completions, **columns):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(ord((text or "a")[0]) % 7) for text in texts]
"""
    (tmp_path / "script.py").write_text(
        code.replace("import pivot_plugin as pivot\n", f"import pivot_plugin as pivot\n{reward}")
    )
    rows = []
    for number in range(8):
        picture(40, 40, number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"what {number}?", "answer": "this"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = script(tmp_path / "script.py", "model", "questions.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / out / "encoder" / "pivot.json").exists() and (tmp_path / encoder / "pivot.json").exists()


@pytest.mark.training
def test_specs_runs_its_stages_and_prints_what_each_gave(tmp_path: Path) -> None:
    done = script(EXAMPLES / "specs" / "run.py", "--steps", "20", "--output-dir", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout[done.stdout.index("after stage") :].splitlines()
    assert [line.split("  ")[0] for line in table[1:]] == [
        "base",
        "zero (trains language model)",
        "cold-start (trains language model)",
        "final (trains all)",
    ]
    for stage in ("1-zero", "2-pairs", "3-cold-start", "4-final"):
        assert (tmp_path / "out" / stage).is_dir()
