"""The paper's sixteen benchmarks, run by lmms-eval on a model folder. Nothing of theirs is written anew here.

The blind control runs them a second time on a copy of the folder whose image processor makes every picture one grey:
the same weights and questions, as many image tokens, and nothing to see.

lmms-eval pins many packages, so that it is best installed in an environment of its own; `python` says which.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoProcessor

from pivot_plugin.errors import ModelError, SettingsError, TrainingError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model

from .scores import is_right_or_wrong, mcnemar

# arXiv 2510.16333, table T and appendix E.2, by lmms-eval's names
GROUPS = {
    "general": ("gqa", "seedbench", "mme", "mmbench_en_dev"),
    "knowledge": ("ai2d", "scienceqa_img", "mathvista_testmini", "mmmu_val"),
    "ocr-chart": ("textvqa_val", "docvqa_val", "chartqa", "ocrbench"),
    "vision-centric": ("mmvp", "realworldqa", "cv_bench_2d", "cv_bench_3d"),
}

# image processors divide by what pixels are scaled with
NEARLY_ZERO = 1e-12


def benchmark_command(
    model: str,
    groups: Sequence[str] = tuple(GROUPS),
    output_dir: str | Path = "pivot-benchmarks",
    *,
    limit: int | None = None,
    batch_size: int = 1,
    python: str = sys.executable,
    log_samples: bool = False,
) -> list[str]:
    """The command that runs the benchmarks.

    Args:
        model: folder or Hub id of an MLLM.
        groups: keys of `GROUPS`.
        output_dir: gets lmms-eval's results.
        limit: questions of each benchmark; all where None.
        batch_size: questions at once.
        python: interpreter of the environment that has lmms-eval.
        log_samples: whether it writes down every answer.

    Raises:
        SettingsError: for an unknown group.
        ModelError: for a model that cannot be found, or a family that lmms-eval does not know.
    """
    if not groups or (unknown := sorted(set(groups) - set(GROUPS))):
        raise SettingsError(
            f"There is no group of benchmarks {unknown[0]!r}." if groups else "No group of benchmarks is given.",
            f"Choose of {', '.join(GROUPS)}.",
        )
    tasks = [task for group in groups for task in GROUPS[group]]
    command = [python, "-m", "lmms_eval", "--model", _name(model), "--model_args", f"pretrained={model}"]
    command += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(output_dir)]
    command += ["--log_samples"] if log_samples else []
    return command + (["--limit", str(limit)] if limit else [])


def run_benchmarks(
    model: str,
    groups: Sequence[str] = tuple(GROUPS),
    output_dir: str | Path = "pivot-benchmarks",
    *,
    limit: int | None = None,
    batch_size: int = 1,
    python: str = sys.executable,
    blind: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the benchmarks.

    Args:
        model, groups, output_dir, limit, batch_size, python: as for `benchmark_command`.
        blind: run them again with every picture one grey.

    Returns:
        per task its metrics, as lmms-eval gives them. With `blind` also each metric behind whose name stands
        "/without-picture"; and where a question is scored right or wrong, "/needs-picture", the share that is right
        with the picture and wrong without, and "/p", McNemar's exact p of being right as often without it.

    Raises:
        SettingsError: if lmms-eval is not installed there, a group is unknown, or the pictures cannot be made grey.
        TrainingError: if it fails; what it wrote stays in `output_dir`.
    """
    settings: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "python": python, "log_samples": blind}
    command = benchmark_command(model, groups, output_dir, **settings)
    if subprocess.run([python, "-c", "import lmms_eval"], capture_output=True, check=False).returncode:
        raise SettingsError(
            f"lmms-eval is not installed for {python}.",
            'Run: pip install "pivot-plugin[bench]", best in an environment of its own, and name its python.',
        )
    if not blind:
        return _run(command, Path(output_dir))[0]
    without = Path(output_dir) / "without-picture"
    with tempfile.TemporaryDirectory() as folder:
        grey = grey_copy(model, Path(folder) / "model")
        metrics, samples = _run(command, Path(output_dir))
        of_grey, grey_samples = _run(benchmark_command(str(grey), groups, without, **settings), without)
    for task, found in metrics.items():
        found |= {f"{name}/without-picture": value for name, value in of_grey.get(task, {}).items()}
        for name, right in samples.get(task, {}).items():
            found |= _paired(name, right, grey_samples.get(task, {}).get(name, {}))
    return metrics


def grey_copy(model: str, folder: Path) -> Path:
    """A copy of a model's folder, its weights linked and not copied, that is shown one grey for every picture.

    The pixels are scaled to nothing and nothing is subtracted, so that a model gets zeros (up to 1e-9), which stand for
    the mean of what it was normalised by.

    Args:
        model: folder or Hub id.
        folder: to be made.

    Raises:
        SettingsError: if its image processor still tells pictures apart.
    """
    source = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text())
        inner = settings.get("image_processor", settings if name.startswith("preprocessor") else {})
        if inner:
            inner |= {"do_rescale": True, "rescale_factor": NEARLY_ZERO, "image_mean": [0.0] * 3}
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(settings))
    _check_grey(folder, model)
    return folder


def _check_grey(folder: Path, model: str) -> None:
    pictures = [Image.effect_noise((96, 96), 80).convert("RGB") for _ in range(2)]
    finding = ""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False).image_processor
        values = [processor(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]
        if max(float(value.abs().max()) for value in values) > 1e-6:
            finding = "it still tells two pictures apart"
    except (OSError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        finding = f"{type(error).__name__}: {error}"
    if finding:
        raise SettingsError(
            f"The image processor of {model!r} cannot be made to show one grey: {finding}.",
            "Leave out the blind control (--blind), or ask by pivot compare --probe vqa=..., which replaces pictures.",
        )


Samples = dict[str, dict[str, dict[str, float]]]


def _run(command: list[str], output_dir: Path) -> tuple[dict[str, dict[str, float]], Samples]:
    """What a run of lmms-eval gives: metrics by task, and by task and metric the score of each question."""
    before = set(output_dir.rglob("*.json*"))
    run = subprocess.run(command, check=False)
    written = sorted(set(output_dir.rglob("*.json*")) - before)
    results = [file for file in written if file.name.endswith("_results.json")]
    if run.returncode or not results:
        raise TrainingError(
            f"lmms-eval ended with status {run.returncode}" + ("." if run.returncode else " and wrote no results."),
            f"Read what it printed; run it yourself: {' '.join(command)}",
        )
    found = json.loads(results[-1].read_text())["results"]
    metrics = {
        task: {name.split(",")[0]: float(v) for name, v in of.items() if isinstance(v, int | float)}
        for task, of in found.items()
    }
    samples: Samples = {}
    for file in written:
        _, marker, task = file.stem.partition("_samples_")
        if marker and task in metrics:
            samples[task] = _scores_of(file, metrics[task])
    return metrics, samples


def _scores_of(file: Path, metrics: Iterable[str]) -> dict[str, dict[str, float]]:
    """By metric the score of each question, where it is a number."""
    scores: dict[str, dict[str, float]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        for name in metrics:
            if isinstance(row.get(name), int | float):
                scores.setdefault(name, {})[str(row["doc_id"])] = float(row[name])
    return scores


def _paired(name: str, right: Mapping[str, float], blind: Mapping[str, float]) -> dict[str, float]:
    shared = sorted(right.keys() & blind.keys())
    seen, unseen = (np.array([of[question] for question in shared]) for of in (right, blind))
    if not shared or not (is_right_or_wrong(seen) and is_right_or_wrong(unseen)):
        return {}
    return {
        f"{name}/needs-picture": float(((seen == 1) & (unseen == 0)).mean()),
        f"{name}/p": mcnemar(seen, unseen),
    }


def _name(model: str) -> str:
    adapter = find_adapter(empty_model(model))
    if adapter.lmms_eval_name is None:
        raise ModelError(
            f"What lmms-eval calls the family {adapter.family!r} is not known.",
            "Write an adapter with lmms_eval_name, or run lmms-eval yourself.",
        )
    return adapter.lmms_eval_name
