"""What is refused before processes are started."""

from pathlib import Path

import pytest

from pivot_plugin.cli.launching import Nodes, relaunched
from pivot_plugin.errors import SettingsError


def test_a_key_that_accelerate_does_not_know_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("num_procesess: 2\n")
    with pytest.raises(SettingsError, match="'num_procesess'"):
        relaunched(file)


def test_several_nodes_need_a_place_to_meet() -> None:
    with pytest.raises(SettingsError, match="which it is or where they meet"):
        Nodes(2, 0)


def test_a_rank_belongs_to_one_of_the_nodes() -> None:
    with pytest.raises(SettingsError, match="machine-rank is 2 of 2"):
        Nodes(2, 2, "node0:29500")


def test_a_rendezvous_has_a_port() -> None:
    with pytest.raises(SettingsError, match="HOST:PORT"):
        Nodes(2, 0, "node0")


def test_nodes_become_words_of_the_launcher() -> None:
    words = Nodes(2, 1, "node0:29500").words()
    assert words == [
        *("--num_machines", "2", "--machine_rank", "1"),
        *("--main_process_ip", "node0", "--main_process_port", "29500"),
    ]
