"""The paper's sixteen benchmarks, run by lmms-eval on a model folder. Nothing of theirs is written anew here.

lmms-eval pins many packages, so that it is best installed in an environment of its own; `python` says which.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pivot_plugin.errors import ModelError, SettingsError, TrainingError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import empty_model

# arXiv 2510.16333, table T and appendix E.2, by lmms-eval's names
GROUPS = {
    "general": ("gqa", "seedbench", "mme", "mmbench_en_dev"),
    "knowledge": ("ai2d", "scienceqa_img", "mathvista_testmini", "mmmu_val"),
    "ocr-chart": ("textvqa_val", "docvqa_val", "chartqa", "ocrbench"),
    "vision-centric": ("mmvp", "realworldqa", "cv_bench_2d", "cv_bench_3d"),
}


def benchmark_command(
    model: str,
    groups: Sequence[str] = tuple(GROUPS),
    output_dir: str | Path = "pivot-benchmarks",
    *,
    limit: int | None = None,
    batch_size: int = 1,
    python: str = sys.executable,
) -> list[str]:
    """The command that runs the benchmarks.

    Args:
        model: folder or Hub id of an MLLM.
        groups: keys of `GROUPS`.
        output_dir: gets lmms-eval's results.
        limit: questions of each benchmark; all where None.
        batch_size: questions at once.
        python: interpreter of the environment that has lmms-eval.

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
    return command + (["--limit", str(limit)] if limit else [])


def run_benchmarks(
    model: str,
    groups: Sequence[str] = tuple(GROUPS),
    output_dir: str | Path = "pivot-benchmarks",
    *,
    limit: int | None = None,
    batch_size: int = 1,
    python: str = sys.executable,
) -> dict[str, dict[str, float]]:
    """Run the benchmarks.

    Args:
        model, groups, output_dir, limit, batch_size, python: as for `benchmark_command`.

    Returns:
        per task its metrics, as lmms-eval gives them.

    Raises:
        SettingsError: if lmms-eval is not installed there, or a group is unknown.
        TrainingError: if it fails; what it wrote stays in `output_dir`.
    """
    command = benchmark_command(model, groups, output_dir, limit=limit, batch_size=batch_size, python=python)
    if subprocess.run([python, "-c", "import lmms_eval"], capture_output=True, check=False).returncode:
        raise SettingsError(
            f"lmms-eval is not installed for {python}.",
            'Run: pip install "pivot-plugin[bench]", best in an environment of its own, and name its python.',
        )
    before = set(Path(output_dir).rglob("*_results.json"))
    run = subprocess.run(command, check=False)
    written = sorted(set(Path(output_dir).rglob("*_results.json")) - before)
    if run.returncode or not written:
        raise TrainingError(
            f"lmms-eval ended with status {run.returncode}" + ("." if run.returncode else " and wrote no results."),
            f"Read what it printed; run it yourself: {' '.join(command)}",
        )
    results = json.loads(written[-1].read_text())["results"]
    return {
        task: {name.split(",")[0]: float(v) for name, v in metrics.items() if isinstance(v, int | float)}
        for task, metrics in results.items()
    }


def _name(model: str) -> str:
    adapter = find_adapter(empty_model(model))
    if adapter.lmms_eval_name is None:
        raise ModelError(
            f"What lmms-eval calls the family {adapter.family!r} is not known.",
            "Write an adapter with lmms_eval_name, or run lmms-eval yourself.",
        )
    return adapter.lmms_eval_name
