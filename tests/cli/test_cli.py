"""The `pivot` command, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_plugin.testing import build, zoo
from tests.helpers import picture
from tests.helpers.processes import pivot


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with pairs."""
    folder = tmp_path_factory.mktemp("world")
    model, processor = build("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pairs").mkdir()
    rows = []
    for number in range(8):
        picture(40, 40, number).save(folder / "pairs" / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": "what?", "chosen": f"it is {number}", "rejected": "no"})
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_help_loads_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["pivot", "--help"]
from pivot_plugin.cli import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules, "heavy import"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for command in ("optimize", "inspect", "adapters", "demo"):
        assert command in run.stdout


@pytest.mark.training
def test_optimize_trains_and_says_where_the_encoder_is(world: Path, tmp_path: Path) -> None:
    options = ["--set", "max_steps=2", "--set", "use_cpu=true", "--set", "disable_tqdm=true", "-o", tmp_path / "run"]
    run = pivot("optimize", world / "model", world / "pairs", *options, "--lora", "4", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "preference accuracy (chance 0.5)" in run.stdout and "next: pivot report" in run.stdout
    assert "encoder" in run.stdout
    assert "parameters train" in run.stderr
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()
    as_json = pivot(
        "optimize", world / "model", world / "pairs", *options[:-1], tmp_path / "other", "--json", folder=tmp_path
    )
    assert json.loads(as_json.stdout)["metrics"].keys() == {"before", "after"}
    again = pivot("optimize", world / "model", world / "pairs", *options, "--lora", "4", folder=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("pivot: output_dir")
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_stepz=2"], "Did you mean max_steps"),
        (["--set", "oops"], "is not name=value"),
        (["--lora", "many"], "--lora is 'many'"),
        (["--objective", "dop"], "Did you mean dpo"),
    ],
)
def test_a_typo_is_one_sentence(world: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    run = pivot("optimize", world / "model", world / "pairs", "-o", tmp_path / "run", *arguments, folder=tmp_path)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_word_that_is_no_choice_is_refused_with_the_choices(tmp_path: Path) -> None:
    run = pivot("optimize", "model", "pairs", "--train", "tower", folder=tmp_path)
    assert run.returncode == 2
    assert "'tower'" in run.stderr and "'projector+language_model'" in run.stderr
    assert "keep|new|first-layer" in pivot("graft", "--help", folder=tmp_path).stdout


def test_inspect_shows_what_the_adapter_sees(world: Path, tmp_path: Path) -> None:
    run = pivot("inspect", world / "model", "--json", folder=tmp_path)
    facts: dict[str, Any] = json.loads(run.stdout)
    assert facts["family"] == "llava"
    assert facts["vision tower"] == "CLIPVisionModel at model.vision_tower"
    assert facts["features in use"] == "hidden state -2 of 3 blocks"
    assert facts["image tokens"] == ["16 for 336x336 px", "16 for 672x336 px", "16 for 1024x768 px"]
    assert facts["prefix forest"] == "yes"
    assert "model.vision_tower.encoder.layers.*.mlp.fc1 (2)" in facts["LoRA"]
    table = pivot("inspect", world / "model", folder=tmp_path)
    assert "CLIPVisionModel at model.vision_tower" in table.stdout


@pytest.mark.slow
def test_check_tries_every_promise_and_prints_what_was_found(world: Path, tmp_path: Path) -> None:
    run = pivot("check", world / "model", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    checks: list[dict[str, str]] = json.loads(run.stdout.splitlines()[-1])
    assert len(checks) == 10
    assert {check["result"] for check in checks} == {"passed"}
    table = pivot("check", world / "model", folder=tmp_path)
    assert table.returncode == 0
    assert "forest equals plain passes" in table.stdout
    nothing = pivot("check", tmp_path / "nothing", folder=tmp_path)
    assert nothing.returncode == 1
    assert "No MLLM could be loaded" in nothing.stderr


@pytest.mark.slow
def test_check_of_a_model_that_breaks_a_promise_ends_with_1_and_names_it(tmp_path: Path) -> None:
    model, processor = zoo.build("mllama")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    run = pivot("check", tmp_path / "model", folder=tmp_path)
    assert run.returncode == 1
    assert "failed" in run.stdout and "cross-attention" in run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_check_of_a_model_without_a_processor_is_one_sentence(world: Path, tmp_path: Path) -> None:
    build("llava")[0].save_pretrained(tmp_path / "bare")
    run = pivot("check", tmp_path / "bare", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("pivot: ") and "processor" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_inspect_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    run = pivot("inspect", tmp_path / "nothing", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("pivot: No MLLM could be loaded")


def test_adapters_lists_the_built_in_ones(tmp_path: Path) -> None:
    run = pivot("adapters", "--json", folder=tmp_path)
    names = [info["name"] for info in json.loads(run.stdout)]
    families, made = ["internvl", "qwen-vl", "llava", "generic"], ["rejected-pictures", "makers"]
    others = ["probes", "rewards", "objectives", "stack-layouts", "published-layouts"]
    assert names[-12:] == [*families, "embedded-world", *made, *others]


def test_version_is_printed(tmp_path: Path) -> None:
    import pivot_plugin

    assert pivot("--version", folder=tmp_path).stdout.strip() == pivot_plugin.__version__


def test_prefs_check_reports_and_fails_on_errors(world: Path, tmp_path: Path) -> None:
    good = pivot("prefs", "check", world / "pairs", "--processor", world / "model", folder=tmp_path)
    assert good.returncode == 0, good.stderr
    assert "pairs.jsonl: 8 pairs, 0 with errors" in good.stdout
    assert "image tokens per image: 16" in good.stdout
    (tmp_path / "bad.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": "a"}\n{"prompt": "?", "chosen":')
    bad = pivot("prefs", "check", "bad.jsonl", "--json", folder=tmp_path)
    assert bad.returncode == 1
    report = json.loads(bad.stdout)
    assert {defect["kind"]: defect["rows"] for defect in report["defects"]} == {"equal answers": [0], "not JSON": [1]}


def test_prefs_check_takes_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"ask": "?", "good": "a", "bad": "b"}\n')
    unknown = pivot("prefs", "check", "odd.jsonl", folder=tmp_path)
    assert unknown.returncode == 1
    assert "columns ask, good, bad, which is no known layout" in unknown.stderr
    named = ["--column", "prompt=ask", "--column", "chosen=good", "--column", "rejected=bad"]
    assert pivot("prefs", "check", "odd.jsonl", *named, folder=tmp_path).returncode == 0
    wrong = pivot("prefs", "check", "odd.jsonl", "--column", "prompt", folder=tmp_path)
    assert "--column 'prompt' is not ours=theirs" in wrong.stderr


@pytest.mark.training
def test_images_in_a_folder_of_their_own_are_found_by_check_and_optimize(world: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.jsonl").write_text((world / "pairs" / "pairs.jsonl").read_text())
    beside = pivot("prefs", "check", "moved.jsonl", folder=tmp_path)
    assert beside.returncode == 1
    assert "error: image not found" in beside.stdout
    there = ["--image-folder", world / "pairs"]
    assert pivot("prefs", "check", "moved.jsonl", *there, folder=tmp_path).returncode == 0
    training = ["--set", "max_steps=1", "--set", "use_cpu=true", "--lora", "4", "--eval-prefs", "moved.jsonl"]
    trained = pivot("optimize", world / "model", "moved.jsonl", *there, *training, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]


def rewarding_length(folder: Path) -> dict[str, str]:
    """Install a plugin with a reward `length`; the variables with which it is found."""
    (folder / "plugin.py").write_text(
        "from pivot_plugin.hooks import hookimpl\n"
        "def length(prompts, completions, **columns):\n    return [len(str(c)) for c in completions]\n"
        "class Plugin:\n    @hookimpl\n    def pivot_rewards(self):\n        return {'length': length}\n"
        "plugin = Plugin()\n"
    )
    (folder / "plugin-1.dist-info").mkdir()
    (folder / "plugin-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (folder / "plugin-1.dist-info" / "entry_points.txt").write_text("[pivot_plugin]\nplugin = plugin:plugin\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.training
def test_prefs_build_makes_pairs_that_optimize_takes(world: Path, tmp_path: Path) -> None:
    lines = [{"image": str(world / "pairs" / f"{n}.png"), "question": "what?", "answer": str(n)} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    variables = rewarding_length(tmp_path)
    arguments = ["prefs", "build", world / "model", "questions.jsonl", "-o", "out", "--reward", "length=2"]
    options = ["--n", "4", "--max-new-tokens", "4", "--pair-up", "all"]
    first = pivot(*arguments, *options, folder=tmp_path, **variables)
    assert first.returncode == 0, first.stderr[-2000:]
    again = pivot(*arguments, *options, "--json", folder=tmp_path, **variables)
    assert json.loads(again.stdout)["questions"] == 4
    assert "4 questions are sampled already" in again.stderr
    assert "Rewards: length (weight 2)" in (tmp_path / "out" / "pairs" / "README.md").read_text()
    training = ["--set", "max_steps=1", "--set", "use_cpu=true", "--lora", "4"]
    trained = pivot("optimize", world / "model", "out/pairs", *training, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]


def test_prefs_build_says_what_is_wrong_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    typo = pivot("prefs", "build", "no-model", "q.jsonl", "-o", "out", "--reward", "acuracy", folder=tmp_path)
    assert "Did you mean accuracy" in typo.stderr
    weight = pivot("prefs", "build", "no-model", "q.jsonl", "-o", "out", "--reward", "format=x", folder=tmp_path)
    assert "'x' is no number" in weight.stderr
    missing = pivot("prefs", "build", "no-model", "nothing.jsonl", "-o", "out", folder=tmp_path)
    assert "'nothing.jsonl' cannot be read" in missing.stderr


@pytest.mark.training
def test_optimize_can_skip_bad_pairs_and_lists_them(world: Path, tmp_path: Path) -> None:
    image = str(world / "pairs" / "0.png")
    rows = [{"image": image, "prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)]
    rows[3]["chosen"] = "no"
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--set", "max_steps=1", "--set", "use_cpu=true", "--lora", "4", "-o", "run"]
    refused = pivot("optimize", world / "model", "pairs.jsonl", *options, folder=tmp_path)
    assert refused.returncode == 1
    assert "row 3 of pairs.jsonl: chosen and rejected are equal" in refused.stderr
    assert not (tmp_path / "run" / "encoder").exists()
    skipped = pivot("optimize", world / "model", "pairs.jsonl", *options, "--on-bad-row", "skip", folder=tmp_path)
    assert skipped.returncode == 0, skipped.stderr[-2000:]
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 3


@pytest.mark.training
def test_arms_are_compared_and_the_table_is_printed(world: Path, tmp_path: Path) -> None:
    training = ["--set", "max_steps=1", "--set", "use_cpu=true", "--lora", "4", "--eval-fraction", "0.25"]
    arms = ["--arms", "sft,dpo", "--seeds", "2", "--learning-rate", "dpo=1e-3", "-o", tmp_path / "arms"]
    run = pivot("compare-arms", world / "model", world / "pairs", *arms, *training, folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert lines[0].startswith("| arm | runs | preference_accuracy")
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| base", "1"], ["| sft", "2"], ["| dpo", "2"]]
    typo = pivot("compare-arms", world / "model", world / "pairs", "--arms", "sft,dop", folder=tmp_path)
    assert "Did you mean dpo" in typo.stderr


@pytest.mark.training
def test_online_objectives_run_from_the_command_line(world: Path, tmp_path: Path) -> None:
    lines = [{"image": str(world / "pairs" / f"{n}.png"), "question": "what?", "answer": str(n)} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training = ["--set", "max_steps=1", "--set", "use_cpu=true", "--set", "max_completion_length=4", "--lora", "4"]
    rewards = ["--reward", "accuracy=1", "--reward", "length_penalty=0.1", "-o", tmp_path / "run"]
    run = pivot(
        *("optimize", world / "model", "questions.jsonl", "--objective", "grpo", "--json"),
        *(*rewards, *training),
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(json.loads(run.stdout)["metrics"]["after"]) == {"reward", "rewards/accuracy", "rewards/length_penalty"}


@pytest.mark.training
def test_optimize_on_questions_trains_on_the_model_s_own_answers(world: Path, tmp_path: Path) -> None:
    lines = [{"image": str(world / "pairs" / f"{n}.png"), "question": "what?", "answer": "?"} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    variables = rewarding_length(tmp_path)
    how = ["--set", "samples=4", "--set", "max_new_tokens=6", "--set", "max_steps=1", "--set", "use_cpu=true"]
    how += ["--reward", "accuracy", "--reward", "length=0.1", "--lora", "4", "-o", "run", "--json"]
    run = pivot("optimize", world / "model", "questions.jsonl", *how, folder=tmp_path, **variables)
    assert run.returncode == 0, run.stderr[-2000:]
    (answers,) = json.loads(run.stdout)["answers"]
    assert answers["questions"] == 3
    said = (tmp_path / "run" / "output.log").read_text()
    assert f"{answers['paired']} of 3 questions gave a pair" in said and "Example 1: what?" in said
    assert list((tmp_path / "run" / "own-answers" / "pairs" / "data").glob("*.parquet"))
    both = pivot("optimize", world / "model", world / "pairs", *how, "-o", "both", folder=tmp_path, **variables)
    assert "are preference pairs" in both.stderr


def test_prefs_make_writes_what_optimize_reads_and_no_picture(world: Path, tmp_path: Path) -> None:
    photos = world / "pairs"
    (tmp_path / "photos").mkdir()
    for file in photos.glob("*.png"):
        Image.open(file).resize((64, 64)).save(tmp_path / "photos" / file.name)
    arguments = ["prefs", "make", "jigsaw=2,rotation=1", "photos", "-o", "out", "--count", "9", "--difficulty", "0.1"]
    made = pivot(*arguments, "--json", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {"rows": 9, "file": "out/questions.jsonl"}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["made.json", "questions.jsonl"]
    pairs = pivot(*arguments[:5], "pairs", "--pairs", "--count", "9", folder=tmp_path)
    assert pairs.returncode == 0, pairs.stderr
    checked = pivot("prefs", "check", "pairs", folder=tmp_path)
    assert "9 pairs" in checked.stdout, checked.stdout
    for wrong, said in (
        (["jigsw", "photos"], "no maker 'jigsw'"),
        (["jigsaw=x", "photos"], "'x' is no number"),
        (["jigsaw", "photos", "--difficulty", "3"], "difficulty is 3.0"),
        (["jigsaw", "photos", "--count", "0"], "count is 0"),
    ):
        refused = pivot("prefs", "make", *wrong, "-o", "never", folder=tmp_path)
        assert refused.returncode == 1 and said in refused.stderr, (wrong, refused.stderr)


def test_an_audit_is_printed_and_kept(world: Path, tmp_path: Path) -> None:
    pairs = ["prefs", "audit", world / "model", world / "pairs", "--max-new-tokens", "4"]
    run = pivot(*pairs, "-o", "audit.json", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "pairs (" in run.stdout
    assert "are told apart already (margin above 0" in run.stdout
    assert "Audit: audit.json" in run.stdout
    few = json.loads(pivot(*pairs, "--limit", "2", "--json", folder=tmp_path).stdout)
    every = json.loads((tmp_path / "audit.json").read_text())
    assert [pair["id"] for pair in few["pairs"]] == [pair["id"] for pair in every["pairs"][:2]]
    nothing = pivot(*pairs, "--limit", "0", folder=tmp_path)
    assert "limit 0. Give 1 or more" in nothing.stderr


@pytest.mark.training
def test_a_recipe_s_stages_are_set_one_by_one(world: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "what?", "answer": "1"}\n' * 4)
    common = ["--set", "use_cpu=true", "--set", "eval_fraction=0", "--set", "max_completion_length=4", "--lora", "4"]
    skip = ["--skip", "zero", "--skip", "pairs", "--skip", "cold-start"]
    run = pivot(
        *("recipe", "specs", world / "model", "questions.jsonl", "-o", "out"),
        *(*skip, *common, "--set", "final.max_steps=1"),
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("final: out/4-final (trains: all;")
    typo = pivot("recipe", "specs", world / "model", "questions.jsonl", "--set", "last.max_steps=1", folder=tmp_path)
    assert "stages names ['last']. The stages are zero, pairs, cold-start, final" in typo.stderr


@pytest.mark.training
def test_compare_prints_the_table_and_report_writes_the_page(world: Path, tmp_path: Path) -> None:
    options = ["--set", "max_steps=2", "--set", "use_cpu=true", "--set", "disable_tqdm=true", "-o", "run"]
    assert pivot("optimize", world / "model", world / "pairs", *options, folder=tmp_path).returncode == 0
    for label, colour in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for number in range(5):
            shade = tuple(max(0, value - 8 * number) for value in colour)
            Image.new("RGB", (60, 60), shade).save(tmp_path / "flowers" / label / f"{number}.png")
    measured = pivot(
        *("compare", world / "model", "run", "--probe", "linear=flowers", "--probe", "quick:prototype=flowers"),
        *("--option", "quick.seed=3", "-o", "run/comparison.json"),
        folder=tmp_path,
    )
    assert measured.returncode == 0, measured.stderr[-2000:]
    assert "| linear top1 |" in measured.stdout and "| quick top5 |" in measured.stdout
    written = pivot("report", "run", "-o", "out/report.html", folder=tmp_path)
    assert written.returncode == 0, written.stderr[-2000:]
    assert "Encoders compared" in (tmp_path / "out" / "report.html").read_text()
    for arguments, message in (
        (("report", "run", "-o", "out"), "'out' is a folder"),
        (("report", "flowers"), "holds no run"),
        (("report", "run", "--comparison", "absent.json"), "is no comparison"),
        (("compare", "run"), "No probe is given"),
        (("compare", "run", "--probe", "linear"), "is not name=data"),
        (("compare", "run", "--probe", "liner=flowers"), "Did you mean linear"),
        (("compare", "run", "--probe", "linear=flowers", "--option", "lin.seed=1"), "--option names the probe 'lin'"),
    ):
        run = pivot(*arguments, folder=tmp_path)
        assert run.returncode == 1 and message in run.stderr, (arguments, run.stderr[-500:])


def test_benchmark_prints_the_command_of_lmms_eval(world: Path, tmp_path: Path) -> None:
    run = pivot("benchmark", world / "model", "--group", "vision-centric", "--dry-run", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "-m lmms_eval --model llava_hf" in run.stdout
    assert "mmvp,realworldqa,cv_bench_2d,cv_bench_3d" in run.stdout


def test_extract_and_export_make_an_encoder_of_an_mllm_and_a_folder_for_timm(world: Path, tmp_path: Path) -> None:
    run = pivot("extract", world / "model", "-o", "encoder", "--base", world / "model", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Encoder: encoder (CLIPVisionModel" in run.stdout
    assert "This checkpoint's tower was never trained" in run.stdout
    run = pivot("export", "encoder", "--for", "timm", "-o", "out", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    written = json.loads(run.stdout.splitlines()[-1])
    assert written["settings"]["features"].startswith("model.forward_intermediates(images, indices=[1]")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "vit_base_patch16_clip_224"
    run = pivot("export", "encoder", "--for", "internvl", "-o", "other", folder=tmp_path)
    assert run.returncode == 1
    assert "InternVL cannot hold this CLIPVisionModel" in run.stderr
    run = pivot("extract", world / "nothing", "-o", "none", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1, run.stderr


def test_what_is_no_mllm_is_said_with_the_command_that_takes_it(world: Path, tmp_path: Path) -> None:
    """In a sentence, not in a list of all classes there are; and an encoder's folder is replaced."""
    pivot("extract", world / "model", "-o", "encoder", folder=tmp_path)
    for command in (["inspect", "encoder"], ["extract", "encoder", "-o", "other"]):
        refused = pivot(*command, folder=tmp_path)
        assert refused.returncode == 1
        assert "holds a vision encoder by itself" in refused.stderr and "pivot graft MLLM encoder" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    again = pivot("extract", world / "model", "-o", "encoder", folder=tmp_path)
    assert again.returncode == 0, again.stderr


def test_extract_prints_json(world: Path, tmp_path: Path) -> None:
    run = pivot("extract", world / "model", "-o", "encoder", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer["encoder_class"] == "CLIPVisionModel"
    assert answer["trained"] is None
