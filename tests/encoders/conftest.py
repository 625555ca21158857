"""A Hub, and a process with the released client that knows it."""

from pathlib import Path

import pytest

from pivot_plugin.encoders import save_encoder
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = build("llava")
    folder = tmp_path_factory.mktemp("saved") / "encoder"
    metrics = {"before": {"preference_accuracy": 0.5}, "after": {"preference_accuracy": 0.75}}
    record = {"metrics": metrics, "base": {"mllm": "llava-hf/tiny"}, "license": "apache-2.0"}
    return save_encoder(find_adapter(model), processor, folder, record)


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A saved encoder of a tiny LLaVA."""
    import shutil

    return Path(shutil.copytree(_saved, tmp_path / "encoder"))
