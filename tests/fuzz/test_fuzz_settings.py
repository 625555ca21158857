"""Whatever a setting is, it makes a configuration or is refused by name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pivot_plugin.config import InstructConfig, PivotConfig, PivotGRPOConfig, PivotRLOOConfig
from pivot_plugin.runs.settings import configuration, instruct_configuration
from tests.helpers.fuzzing import ODD_VALUES, fuzz

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
CONFIGS = {"dpo": PivotConfig, "mpo": PivotConfig, "grpo": PivotGRPOConfig, "rloo": PivotRLOOConfig, "": InstructConfig}
# these start or look for other programs
NOT_TRIED = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")
VALUES = [
    *ODD_VALUES,
    False,
    1,
    2,
    0.5,
    1e300,
    "no",
    "steps",
    "epoch",
    "best",
    ["a"],
    [1],
    (1, 2),
    {1, 2},
    Path("/dev"),
]


@st.composite
def settings(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    objective = draw(st.sampled_from(sorted(CONFIGS)))
    names = [field.name for field in fields(CONFIGS[objective]) if field.name not in NOT_TRIED]
    return objective, draw(st.dictionaries(st.sampled_from(names), st.sampled_from(VALUES), min_size=1, max_size=3))


def test_odd_settings() -> None:
    def look(case: tuple[str, dict[str, Any]]) -> None:
        objective, given = case
        if objective:
            configuration(given, Path("run"), objective, "encoder", True, True)
        else:
            instruct_configuration({}, given, Path("run"), "all", True, 8)

    fuzz("settings", settings(), look, cheap=400)
