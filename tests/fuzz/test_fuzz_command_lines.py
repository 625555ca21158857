"""Whatever a command line says, it is done, or refused in words, by typer or by us."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import strategies as st
from PIL import Image
from transformers import Trainer

from pivot_plugin.cli import app
from pivot_plugin.errors import TrainingError
from pivot_plugin.testing import build
from tests.helpers.fuzzing import fuzz

pytestmark = pytest.mark.filterwarnings("ignore")
# runs for minutes, or starts processes
NOT_TRIED = ("demo", "--accelerate-config", "--num-processes")
GOOD = ["model", "pairs.jsonl", "conversations.jsonl", "folder", "dpo", "none", "16", "0.5", "3", "max_steps=1"]
WORDS = [
    *["", "-1", "0", "1", "1e400", "nan", "²", "text", "=", "a=", "=b", "a=b", "model=x", "prefs=3", "output_dir=x"],
    *["learning_rate=abc", "max_steps=-3", "max_steps=1e9", "learning_rates={", "train=all", "resume=1", "{}", "[1"],
    *[
        "seed=" + "9" * 5000,
        "use_cpu=true",
        'beta="x"',
        "loss_type=ipo",
        "optim=foo",
        "num_train_epochs=nan",
        "prompt=q",
    ],
    *["empty", "bad.yaml", "/dev/null", "/dev/zero", "../../x", "a/b", "a/b/c", "http://127.0.0.1:1/x", "\udcff", "é"],
    *["x" * 5000, "encoder", "grpo", "sft,dpo", "--", "-", "~", "\x01", "embedded", "json", "parquet"],
]
NO_TRAINING = "Nothing is trained here."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, data, and what is none of either."""
    monkeypatch.chdir(tmp_path)
    for part in build("llava"):
        part.save_pretrained("model")
    Image.new("RGB", (40, 40)).save("image.png")
    pairs = [{"prompt": f"{n}?", "chosen": "b", "rejected": "c", "image": "image.png", "answer": "b"} for n in range(6)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    turns = [{"question": f"{n}?", "answer": "b", "image": "image.png"} for n in range(6)]
    Path("conversations.jsonl").write_text("\n".join(map(json.dumps, turns)))
    Path("bad.yaml").write_text("a: [")
    Path("empty").touch()
    Path("folder").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise TrainingError(NO_TRAINING, NO_TRAINING)

    monkeypatch.setattr(Trainer, "train", refuse)
    return tmp_path


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


@st.composite
def command_lines(draw: st.DrawFn, tried: list[tuple[tuple[str, ...], Any]]) -> list[str]:
    words = st.sampled_from(GOOD) | st.sampled_from(WORDS)
    path, command = draw(st.sampled_from(tried))
    line = list(path)
    line += [draw(words) for parameter in command.params if parameter.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.opts[0] not in NOT_TRIED]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
        line += [draw(st.sampled_from(option.opts))] + ([] if option.is_flag else [draw(words)])
    return line


def test_odd_command_lines(folder: Path) -> None:
    root = typer.main.get_command(app.cli)
    tried = [(path, command) for path, command in commands(root) if path[0] not in NOT_TRIED]
    kept = {path.name for path in folder.iterdir()}

    def look(line: list[str]) -> None:
        # a recipe that is whole: it makes its data and its models, for minutes
        if line[:2] == ["recipe", "run"] and "embedded" in line:
            return
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                root(line, standalone_mode=False)
        # a usage that is wrong is typer's to tell; a file that cannot be had is told by `main`
        except (typer.BadParameter, typer.Exit, typer.Abort, SystemExit, OSError):
            pass
        except Exception as error:
            if not any(base.__name__ == "ClickException" for base in type(error).__mro__):
                raise
        finally:
            for path in folder.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True) if path.is_file() else None

    fuzz("command lines", command_lines(tried), look, cheap=200)
