"""Probe results on disk, in the folder of a run: `probes/<label>/step-<n>.json`, maps and pictures beside it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pivot_plugin.files import write_whole

from .gradients import PairSaliency
from .scores import ProbeResult, Score

FOLDER = "probes"
_NAME = re.compile(r"step-(\d+)\.json")
# longest side of a kept picture in pixels
PICTURE_SIDE = 448


def save_result(folder: Path, label: str, step: int, result: ProbeResult) -> None:
    """Write a result; a reader sees all of it or nothing.

    Args:
        folder: of the run.
        label: of the probe.
        step: after which it was measured; 0 is before training.
        result: saliency maps among its artefacts are kept too.
    """
    of_label = folder / FOLDER / _folder_name(label)
    of_label.mkdir(parents=True, exist_ok=True)
    record = result.as_dict() | {"label": label, "step": step}
    if isinstance(result.artefacts, list) and all(isinstance(item, PairSaliency) for item in result.artefacts):
        record["saliency"] = [_saliency_record(item) for item in result.artefacts]
        maps = {f"{i}/{loss}": m for i, item in enumerate(result.artefacts) for loss, m in item.maps.items()}
        np.savez_compressed(of_label / f"step-{step}.npz", **maps)
        for index, item in enumerate(result.artefacts):
            picture = of_label / f"image-{index}.png"
            if not picture.exists():
                shown = item.image.copy()
                shown.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                shown.save(picture)
    write_whole(of_label / f"step-{step}.json", json.dumps(record, indent=1, default=str))


def saved_results(folder: Path) -> dict[str, dict[int, ProbeResult]]:
    """Results by label and step; files that cannot be read are left out.

    Args:
        folder: of the run.
    """
    results: dict[str, dict[int, ProbeResult]] = {}
    for file in sorted((folder / FOLDER).glob("*/step-*.json")):
        name = _NAME.fullmatch(file.name)
        try:
            record = json.loads(file.read_text())
            result = _result(record, file)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if name:
            results.setdefault(str(record["label"]), {})[int(name[1])] = result
    return {label: dict(sorted(steps.items())) for label, steps in results.items()}


def _saliency_record(item: PairSaliency) -> dict[str, Any]:
    return {
        "pair": item.pair,
        "question": item.question,
        "chosen": item.chosen,
        "rejected": item.rejected,
        "box": item.box,
        "logps": item.logps,
    }


def _result(record: dict[str, Any], file: Path) -> ProbeResult:
    scores = {name: Score(s["value"], s["low"], s["high"]) for name, s in record["scores"].items()}
    artefacts = None
    if "saliency" in record:
        with np.load(file.with_suffix(".npz")) as maps:
            artefacts = [_saliency(pair, i, maps, file.parent) for i, pair in enumerate(record["saliency"])]
    return ProbeResult(record["probe"], scores, record["settings"], artefacts)


def _saliency(record: dict[str, Any], index: int, maps: Any, folder: Path) -> PairSaliency:
    of_pair = {name.partition("/")[2]: maps[name] for name in maps.files if name.partition("/")[0] == str(index)}
    with Image.open(folder / f"image-{index}.png") as picture:
        image = picture.convert("RGB")
    return PairSaliency(
        record["pair"],
        record["question"],
        record["chosen"],
        record["rejected"],
        image,
        tuple(record["box"]),
        of_pair,
        tuple(record["logps"]),
    )


def _folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.-]", "_", label).lstrip(".") or "probe"
