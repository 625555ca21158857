"""Shared fixtures: a tiny model of every family, pictures of several sizes, and preference pairs about them."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# models of this size gain nothing by threads, and two workers with two threads each lose
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a batch of a tiny model is prepared sooner than a process starts
os.environ.setdefault("PIVOT_WORKERS", "0")

import hypothesis
import pytest
from transformers import Trainer

from pivot_plugin.testing import FAMILIES, build
from tests.helpers import Tiny, hub_server, picture, row
from tests.helpers.hub_client import Client

# how long an example takes depends on what else the machine does, and on who imports a library first
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# settings of a short run, the small recipe, and what of it has ended: who asks for one trains
TRAINING_FIXTURES = {"fast", "recipe", "done", "copied"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TRAINING_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.training)


@pytest.fixture(autouse=True)
def _marked_where_it_trains(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that trains without its mark would slow `make check` down unnoticed."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("This test trains: give it, or its module, the mark pytest.mark.training.")

    if not request.node.get_closest_marker("training"):
        monkeypatch.setattr(Trainer, "train", refuse)


@pytest.fixture(scope="session")
def _built() -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = build(name)
        return made[name]

    return get


@pytest.fixture
def make(_built: Callable[[str], Tiny]) -> Callable[[str], Tiny]:
    """A fresh copy of a family's tiny model, and its processor."""

    def fresh(name: str) -> Tiny:
        model, processor = _built(name)
        return copy.deepcopy(model), copy.deepcopy(processor)

    return fresh


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture
def tiny(family: str, make: Callable[[str], Tiny]) -> Tiny:
    """A fresh tiny model of every family in turn, and its processor."""
    return make(family)


@pytest.fixture
def llava(make: Callable[[str], Tiny]) -> Tiny:
    return make("llava")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a reference cache of its own."""
    monkeypatch.setenv("PIVOT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Eight pairs about image sets of different sizes.

    Two questions on one image, a prompt with two images, a text-only pair, answers that begin alike, and an image that
    stands behind its question.
    """
    first, wide, tall, other, last = (
        picture(60, 60, 1),
        picture(120, 50, 2),
        picture(48, 100, 3),
        picture(90, 70, 4),
        picture(64, 64, 5),
    )
    return [
        row("what is it?", "a red cat", "a red dog!", first),
        row("where?", "here", "over there", first),
        row("<image>which of <image> both?", "left", "the right one", wide, tall),
        row("how many?", "one", "two", tall),
        row("say hello", "hello", "good bye"),
        row("look: <image>", "nice", "awful", first),
        row("colour?", "blue", "green", other),
        row("shape?", "round", "square", last),
    ]


@pytest.fixture
def fast(tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run on the CPU."""
    return {
        "output_dir": tmp_path / "run",
        "max_steps": 4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 0,
    }


@pytest.fixture(scope="session")
def _hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub: hub_server.Hub) -> hub_server.Hub:
    """An empty Hub."""
    for kept in (_hub.repos, _hub.uploaded, _hub.faults, _hub.asked, _hub.siblings, _hub.meanwhile):
        kept.clear()
    return _hub


@pytest.fixture(scope="session")
def client(_hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    started = Client(_hub.url, tmp_path_factory.mktemp("home"))
    yield started
    started.close()
