"""The notebooks run from their first cell to their last on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_plugin.testing import build
from tests.helpers import picture, row
from tests.helpers.processes import ROOT

NOTEBOOKS = ROOT / "examples/notebooks"
pytestmark = pytest.mark.training


def run(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Every cell of code; what the cell tagged "parameters" sets, if it is given another value, is set to that."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        if cell["cell_type"] == "code":
            exec(compile(code, f"<{cell['id']}>", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys(), "the cell sets no such thing"
            namespace |= parameters
    return namespace


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder: Path, name: str) -> str:
    model, processor = build(name)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize(("family", "four_bit"), [("llava", False), ("qwen2_5_vl", True)])
def test_one_gpu(family: str, four_bit: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if four_bit:
        # on CPUs with AVX512 it packs what has been asked without a gradient, and then computes none
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    pairs = [row(f"{n}?", f"yes {n}", "no", picture(40, 40, n)) for n in range(12)]
    namespace = run(
        "one_gpu",
        {"MODEL": saved(folder, family), "PREFS": pairs, "FOUR_BIT": four_bit, "MAX_STEPS": 2, "BATCH": 2},
    )
    kinds = {type(module).__name__ for module in namespace["model"].modules()}
    assert ("Linear4bit" in kinds) == four_bit
    assert max(namespace["result"].weight_change.values()) > 0
    assert (folder / "better-encoder" / "pivot.json").exists() and (folder / "report.html").exists()


def test_is_my_encoder_better(folder: Path) -> None:
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(12):
            shade = tuple(min(255, part + 4 * number) for part in colour)
            Image.new("RGB", (40, 40), shade).save(folder / "pictures" / label / f"{number}.png")
    model, processor = build("llava")
    questions = [{"images": [picture(40, 40, n)], "question": f"{n}?", "answer": "yes"} for n in range(4)]
    namespace = run(
        "is_my_encoder_better",
        {
            "BEFORE": model,
            "AFTER": build("llava")[0],
            "PICTURES": "./pictures",
            "QUESTIONS": questions,
            "PROCESSOR": processor,
        },
    )
    scores = namespace["comparison"].results
    assert scores["before"]["linear"].scores["top1"].value > 0.9
    assert "questions" in namespace["questions"].results["after"]
