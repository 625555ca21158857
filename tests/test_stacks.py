"""The pages of examples/stacks: their commands, run as they stand on tiny checkpoints of each stack's layout."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import pivot_plugin as pivot
from pivot_plugin.cli.app import cli
from pivot_plugin.encoders.compatibility import save_model
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.loading import load_model
from pivot_plugin.testing import build
from tests.helpers import picture
from tests.helpers.foreign import internvl_made, llava_made, tensors
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.training

PAGES = ROOT / "examples" / "stacks"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# added to commands that train, where the last setting of a name wins: what makes them short
SHORT = ["--set", "max_steps=2", "--set", "use_cpu=true", "--set", "disable_tqdm=true"]
IMAGES = 8


class Page:
    """A page in a folder of its own, whose checkpoints are there under the names that it uses.

    Args:
        name: of the page.
        folder: to work in.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.blocks = [match.groups() for match in BLOCK.finditer((PAGES / f"{name}.md").read_text())]
        self.said: dict[str, str] = {}

    def write_rows(self, file: str, images: str) -> None:
        """The page's first row, once for each of a few images."""
        row = next(body for language, named, body in self.blocks if language == "json" and named is None)
        self._rows(file, row)
        (self.folder / images).mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES):
            picture(40, 40, number).save(self.folder / images / f"{number}.png")
        for language, named, body in self.blocks:
            if language == "json" and named is not None:
                self._rows(named, body)

    def _rows(self, file: str, row: str) -> None:
        """A row for every image; what mentions none is written as it stands."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if "0.png" not in row:
            path.write_text(row)
            return
        rows = [json.loads(row.replace("0.png", f"{number}.png")) for number in range(IMAGES)]
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))

    def run(self) -> None:
        """Every command of ours and every line of Python, in order."""
        for language, _, body in self.blocks:
            if language == "python":
                exec(compile(body, "<page>", "exec"), {})
            if language == "bash":
                for line in body.strip().splitlines():
                    self._command(line)

    def _command(self, line: str) -> None:
        program, *words = shlex.split(line)
        assert program == "pivot", f"a block of ours has a command of others: {line}"
        if words[0] in ("optimize", "instruct"):
            words += SHORT
        ran = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert ran.exit_code == 0, f"{line}\n{ran.output}"
        self.said[line] = ran.output

    def answer(self, beginning: str) -> str:
        """What the first command with this beginning printed."""
        return next(said for line, said in self.said.items() if line.startswith(beginning))


def saved(family: str, folder: Path) -> Any:
    """A tiny model of transformers under the name of a real one."""
    model, processor = build(family)
    save_model(model, folder)
    processor.save_pretrained(folder)
    return model


def lora_of(model: Any, base: str, targets: str | list[str], folder: Path) -> None:
    """The folder of a LoRA that a stack has trained."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)


def ms_swift(page: Page) -> None:
    base = "models/Qwen2.5-VL-7B-Instruct"
    model = saved("qwen2_5_vl", page.folder / base)
    # all-linear without freeze_vit, which it writes as a pattern
    pattern = r"^(model\.language_model|model\.visual(?!\.merger))(?=\.).*\.(q_proj|v_proj|qkv)$"
    lora_of(model, base, pattern, page.folder / "output" / "v0" / "checkpoint-100")
    page.write_rows("pairs.jsonl", "images")
    asked = [{"images": [f"images/{number}.png"], "prompt": "What?", "answer": "A kitten."} for number in range(2)]
    (page.folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))


def llama_factory(page: Page) -> None:
    base = "models/Qwen3-VL-4B-Instruct"
    model = saved("qwen3_vl", page.folder / base)
    # freeze_vision_tower: names of the language model's layers
    targets = [name for name, _ in model.named_modules() if "language_model" in name and name.endswith("_proj")]
    lora_of(model, base, targets, page.folder / "saves" / "qwen3-vl-4b" / "lora" / "dpo")
    page.write_rows("data/pairs.json", "data/images")


def llava_next(page: Page) -> None:
    for case, name in (("qwen, tiles with a limit", "llava-onevision-qwen2-7b"), ("llama, CLIP", "llava-v1.5-7b")):
        _, made = llava_made(page.folder / "made" / name, case)
        (page.folder / "checkpoints").mkdir(exist_ok=True)
        made.rename(page.folder / "checkpoints" / name)
    page.write_rows("pairs.json", "images")


def internvl(page: Page) -> None:
    _, made = internvl_made(page.folder / "made", "Qwen2")
    (page.folder / "models").mkdir()
    made.rename(page.folder / "models" / "InternVL3-2B")
    page.write_rows("pairs.jsonl", "images")


def qwen3_vl(page: Page) -> None:
    saved("qwen3_vl", page.folder / "models" / "Qwen3-VL-4B-Instruct")
    # tune_mm_vision False: another language model around the same tower
    model, processor = build("qwen3_vl")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    save_model(model, page.folder / "output")
    processor.save_pretrained(page.folder / "output")
    page.write_rows("pairs.json", "images")


def trl(page: Page) -> None:
    model = saved("llava", page.folder / "models" / "llava-1.5-7b-hf")
    lora_of(model, "models/llava-1.5-7b-hf", ["q_proj", "v_proj"], page.folder / "dpo-out")
    page.write_rows("pairs.jsonl", "images")


PREPARED: dict[str, Callable[[Page], None]] = {
    "ms-swift": ms_swift,
    "llama-factory": llama_factory,
    "llava-next": llava_next,
    "internvl": internvl,
    "qwen3-vl": qwen3_vl,
    "trl": trl,
}


def same_tower(model: str, encoder: str, part: str = "") -> None:
    """An MLLM's tower, or a part of it, is an encoder, weight for weight."""
    state = find_adapter(load_model(model)[0]).tower.state_dict()
    expected = {name: t for name, t in pivot.load_encoder(encoder).state_dict().items() if name.startswith(part)}
    assert expected
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_every_page_is_listed_and_tested() -> None:
    pages = {file.stem for file in PAGES.glob("*.md")} - {"README"}
    assert pages == PREPARED.keys()
    assert pages == set(re.findall(r"\]\(([\w-]+)\.md\)", (PAGES / "README.md").read_text()))


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """A page after all its commands have run."""
    monkeypatch.chdir(tmp_path)
    made = Page(request.param, tmp_path)
    PREPARED[request.param](made)
    made.run()
    return made


TRAINED, UNTRAINED = "Change of the weights", "was never trained"


@pytest.mark.parametrize("page", ["ms-swift"], indirect=True)
def test_ms_swift(page: Page) -> None:
    assert TRAINED in page.answer("pivot extract")
    same_tower("better-qwen", "run/encoder")
    # their LoRA is in the language model that goes back
    base, better = (tensors(Path(name)) for name in ("models/Qwen2.5-VL-7B-Instruct", "better-qwen"))
    assert any("visual" not in name and not torch.equal(base[name], better[name]) for name in base)


@pytest.mark.parametrize("page", ["llama-factory"], indirect=True)
def test_llama_factory(page: Page) -> None:
    assert UNTRAINED in page.answer("pivot extract")
    same_tower("saves/qwen3-vl-4b/pivot", "run/encoder")


@pytest.mark.parametrize("page", ["llava-next"], indirect=True)
def test_llava_next(page: Page) -> None:
    same_tower("checkpoints/better-llava", "run/encoder")
    before, after, whole = (
        tensors(Path("checkpoints") / name) for name in ("llava-onevision-qwen2-7b", "better-llava", "all-better")
    )
    assert before.keys() == after.keys() == whole.keys()
    tower = {name for name in before if name.startswith("model.vision_tower.")}
    assert {name for name in before if not torch.equal(before[name], after[name])} < tower
    # as CLIPVisionModel of any release calls them
    assert all(name.startswith("vision_model.") for name in tensors(Path("clip-tower")))


@pytest.mark.parametrize("page", ["internvl"], indirect=True)
def test_internvl(page: Page) -> None:
    same_tower("models/InternVL3-2B-pivot", "run/encoder")
    whole, alone = (tensors(Path("models") / name) for name in ("InternVL3-2B-pivot", "InternViT-pivot"))
    # the tower by itself has the names and numbers that it has inside
    assert alone
    assert all(torch.equal(tensor, whole[f"vision_model.{name}"]) for name, tensor in alone.items())


@pytest.mark.parametrize("page", ["qwen3-vl"], indirect=True)
def test_qwen3_vl(page: Page) -> None:
    assert UNTRAINED in page.answer("pivot extract")
    same_tower("qwen3-vl-4b-pivot", "run/encoder")
    # the merger in it is the projector, which trained
    same_tower("instructed/model", "run/encoder", "blocks.")


@pytest.mark.parametrize("page", ["trl"], indirect=True)
def test_trl(page: Page) -> None:
    assert TRAINED in page.answer("pivot extract")
    same_tower("better-llava", "run/encoder")
