"""The commands of the whole recipe, as a user types them, in one process and in two."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForImageTextToText

from tests.helpers import picture
from tests.helpers.encoders import encoder, language_model
from tests.helpers.processes import pivot

FAST = ("use_cpu=true", "max_steps=2", "per_device_train_batch_size=4", "save_strategy=no", "logging_steps=1")
QUICK = [word for setting in (*FAST, "gradient_accumulation_steps=1") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a language model, captions and conversations."""
    folder = tmp_path_factory.mktemp("parts")
    tower, images, _ = encoder("siglip")
    model, tokens = language_model("qwen2")
    for part, name in ((tower, "encoder"), (images, "encoder"), (model, "language-model"), (tokens, "language-model")):
        part.save_pretrained(folder / name)
    (folder / "images").mkdir()
    captions, talks = [], []
    for number in range(8):
        picture(40, 40, number).save(folder / "images" / f"{number}.png")
        captions.append({"image": f"{number}.png", "caption": f"picture {number}"})
        said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"it is {number}"}]
        talks.append({"image": f"{number}.png", "conversations": said})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


@pytest.mark.training
def test_an_mllm_is_assembled_aligned_and_instructed(parts: Path, tmp_path: Path) -> None:
    run = pivot("assemble", parts / "encoder", parts / "language-model", "-o", "mllm", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    made = json.loads(run.stdout)
    assert made["model"] == "mllm" and made["model_class"] == "LlavaForConditionalGeneration" and made["parameters"]
    again = pivot("assemble", parts / "encoder", parts / "language-model", "-o", "mllm", folder=tmp_path)
    assert again.returncode == 1 and "'mllm' is not empty" in again.stderr
    images = ["--image-folder", str(parts / "images")]
    run = pivot("align", "mllm", parts / "captions.json", *images, "-o", "aligned", *QUICK, "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    aligned = json.loads(run.stdout)
    assert aligned["model"] == "aligned/model" and aligned["metrics"] == {}
    assert aligned["trained"]["projector"][0] > 0 == aligned["trained"]["encoder"][0]
    run = pivot(
        *("instruct", "aligned/model", parts / "talks.jsonl", *images, "--train", "all", "-o", "done"),
        *QUICK,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "MLLM: done/model" in run.stdout and "nothing here says whether the model is better" in run.stdout.replace(
        "\n", " "
    )
    AutoModelForImageTextToText.from_pretrained(tmp_path / "done" / "model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["align", "mllm", "captions.json", "--set", "learning_rat=1"], "learning_rat"),
        (["instruct", "mllm", "captions.json", "--lora", "many"], "--lora is 'many'"),
        (["align", "m", "c", "--accelerate-config", "zero9"], "There is no accelerate configuration 'zero9'"),
        (["optimize", "m", "p", "--accelerate-config", "zero9"], "fsdp1, fsdp2"),
        (["recipe", "run", "nowhere.yaml"], "The recipe 'nowhere.yaml' cannot be read"),
        (["recipe", "run", "embedded", "--dry-run", "--seeds", "a"], "--seeds is 'a'"),
        (["recipe", "show", "papr"], "There is no ready recipe 'papr'"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    run = pivot(*arguments, folder=tmp_path)
    assert run.returncode == 1
    assert said in run.stderr and "Traceback" not in run.stderr


def test_a_ready_recipe_is_shown_and_planned(tmp_path: Path) -> None:
    shown = pivot("recipe", "show", "paper", folder=tmp_path)
    assert yaml.safe_load(shown.stdout)["language_model"] == "Qwen/Qwen2.5-1.5B-Instruct"
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    planned = pivot("recipe", "run", "mine.yaml", "--dry-run", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "12,500" in planned.stdout
    as_json = pivot("recipe", "run", "mine.yaml", "--dry-run", "--json", folder=tmp_path)
    assert [stage["name"] for stage in json.loads(as_json.stdout)["stages"]][:2] == ["align", "instruct"]
    (tmp_path / "mine.yaml").write_text(shown.stdout.replace("  beta:", "  betta:"))
    wrong = pivot("recipe", "run", "mine.yaml", "--dry-run", folder=tmp_path)
    assert wrong.returncode == 1 and "optimize has no key 'betta'. Did you mean beta?" in wrong.stderr
    assert not (tmp_path / "pivot-paper").exists()


@pytest.mark.training
@pytest.mark.timeout(300)
def test_two_processes_by_accelerate_s_own_configuration_give_the_losses_of_one(parts: Path, tmp_path: Path) -> None:
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_processes": 3,
        "num_machines": 1,
        "machine_rank": 0,
        "use_cpu": True,
        "mixed_precision": "no",
        "main_training_function": "main",
        "rdzv_backend": "static",
    }
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(config))
    made = pivot("assemble", parts / "encoder", parts / "language-model", "-o", "mllm", folder=tmp_path)
    assert made.returncode == 0 and "MLLM: mllm (" in made.stdout, made.stderr
    curves = []
    for size, more in ((4, []), (2, ["--accelerate-config", "cpu.yaml", "--num-processes", "2"])):
        settings = [word.replace("batch_size=4", f"batch_size={size}") for word in QUICK]
        run = pivot(
            *("instruct", "mllm", parts / "talks.jsonl", "--image-folder", parts / "images", "--train", "all"),
            *("-o", f"run-{size}", "--set", "learning_rate=1e-3", "--set", "max_steps=4", *settings, *more),
            folder=tmp_path,
            OMP_NUM_THREADS="1",
            ACCELERATE_USE_CPU="true",
        )
        assert run.returncode == 0, run.stderr[-3000:]
        history = json.loads((tmp_path / f"run-{size}" / "run.json").read_text())["history"]
        curves.append([entry["loss"] for entry in history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    one, two = (AutoModelForImageTextToText.from_pretrained(tmp_path / f"run-{size}" / "model") for size in (4, 2))
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert first.allclose(second, rtol=1e-3, atol=1e-5), name
