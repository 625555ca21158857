"""Optional packages: missing ones are named with the command that installs them, before anything is loaded."""

from pathlib import Path

import pytest

from pivot_plugin import extras
from pivot_plugin.errors import SettingsError
from pivot_plugin.runs.settings import configuration


def test_a_tracker_that_is_not_installed_is_refused_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.TRACKERS, "trackio", (("no_module_of_that_name",), "trackio"))
    for report_to in ("trackio", ["none", "trackio"]):
        with pytest.raises(SettingsError, match=r"report_to names 'trackio', which is not installed"):
            configuration({"report_to": report_to}, tmp_path, "dpo", "encoder", True, True)
    monkeypatch.setitem(extras.TRACKERS, "trackio", (("no_module_of_that_name", "json"), "trackio"))
    extras.check_trackers("trackio")
    extras.check_trackers("none")
    # of what is not known here transformers speaks
    extras.check_trackers("a tracker of tomorrow")
