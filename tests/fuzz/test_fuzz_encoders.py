"""Encoder folders changed at random: refused in our words, or the very encoder that was saved."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pivot_plugin as pivot
from pivot_plugin.encoders import save_encoder
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import build
from tests.helpers.examples import EXAMPLES
from tests.helpers.tampering import ADDED, Tampering, outcome, state_of, tamperings

FAMILIES = ("llava", "qwen2_5_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """An encoder of each family, and its state."""
    made = {}
    for name in FAMILIES:
        model, processor = build(name)
        folder = save_encoder(find_adapter(model), processor, tmp_path_factory.mktemp(name) / "encoder", {})
        made[name] = folder, state_of(*pivot.load_encoder(folder, with_processor=True))
    return made


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_a_changed_folder_is_refused_or_is_what_was_saved(folders: Any, data: st.DataObject) -> None:
    folder, state = folders[data.draw(st.sampled_from(FAMILIES))]
    tampering = data.draw(tamperings(folder))
    with tempfile.TemporaryDirectory() as scratch:
        assert outcome(folder, state, tampering, Path(scratch)) is None


@pytest.mark.parametrize("record", ["as found", "rewritten", "removed"])
@pytest.mark.parametrize("name", sorted(ADDED))
def test_a_file_that_was_added_changes_nothing(folders: Any, tmp_path: Path, name: str, record: str) -> None:
    folder, state = folders["llava"]
    added = Tampering(name, "added", lambda f: (f / name).write_bytes(ADDED[name]), record)
    assert outcome(folder, state, added, tmp_path) is None
