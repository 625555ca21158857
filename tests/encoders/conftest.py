"""A Hub, and a process with the released client that knows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pivot_plugin.encoders import save_encoder
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build
from tests.helpers import hub_server
from tests.helpers.hub_client import Client


@pytest.fixture(scope="session")
def _hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub: hub_server.Hub) -> hub_server.Hub:
    """An empty Hub."""
    for kept in (_hub.repos, _hub.uploaded, _hub.faults, _hub.asked, _hub.siblings):
        kept.clear()
    return _hub


@pytest.fixture(scope="session")
def client(_hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    started = Client(_hub.url, tmp_path_factory.mktemp("home"))
    yield started
    started.close()


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
