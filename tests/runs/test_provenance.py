"""What of a run's options may be published: listed names, with numbers and choices, whatever else was given."""

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_plugin.runs.provenance import LORA, PUBLISHED, published_settings
from tests.helpers.examples import EXAMPLES

SECRET = "hf_AbCdEf0123456789AbCd"
PRIVATE = (SECRET, "/home/alice/project", "alice@host", "run of alice", "http://10.0.0.1:8080", "..\\alice", "~/x")


class Schedule(Enum):
    COSINE = "cosine"


def test_numbers_and_choices_of_the_list_stay() -> None:
    kept = {
        "objective": "dpo",
        "learning_rate": 1e-5,
        "loss_type": ["sigmoid", "sft"],
        "learning_rates": {"encoder": 1e-4},
        "frozen": ["model.vision_tower.encoder.layers.0"],
        "max_length": None,
        "bf16": True,
        "rewards": ["accuracy", "format"],
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": [r"layers\.(0|1)\.self_attn", "q_proj"]},
    }
    assert published_settings(kept) == kept
    assert published_settings({"lr_scheduler_type": Schedule.COSINE}) == {"lr_scheduler_type": "cosine"}


@pytest.mark.parametrize(
    "name", ["hub_token", "run_name", "output_dir", "model_init_kwargs", "reference_cache", "project"]
)
def test_what_is_not_listed_is_left_out(name: str) -> None:
    assert published_settings({name: "x", "beta": 0.1}) == {"beta": 0.1}


@pytest.mark.parametrize("private", PRIVATE)
def test_what_is_no_choice_is_left_out_under_listed_names_too(private: str) -> None:
    given = {
        "objective": private,
        "lora": {"r": 8, "bias": private, "auto_mapping": "x"},
        "rewards": ["format", private],
    }
    assert published_settings(given) == {"lora": {"r": 8}}


names = (
    st.sampled_from(sorted(PUBLISHED | LORA)) | st.sampled_from(["hub_token", "token", "path"]) | st.text(max_size=9)
)
leaves: st.SearchStrategy[Any] = st.sampled_from([*PRIVATE, Path(PRIVATE[1]), object(), 1, 0.5, None, True, "dpo"])
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names | leaves, v, max_size=3))


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(names, values, max_size=6))
def test_nothing_private_comes_through_in_any_form(given: dict[str, Any]) -> None:
    text = json.dumps(published_settings(given))
    assert not any(json.dumps(private)[1:-1] in text for private in PRIVATE)
