"""Every family of the zoo is read right, shown on rows, or refused in a sentence; none raises anything else."""

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from pivot_plugin.data.pairs import PairDataset
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.testing import zoo
from pivot_plugin.training.forest_check import read_rows
from pivot_plugin.training.forward import ForestReading
from tests.helpers import picture, row

pytestmark = pytest.mark.slow

ONE = row("what is it?", "a red cat", "a red dog!", picture(60, 60, 1))
ANOTHER = row("<image>where?", "here", "there now", picture(100, 64, 2))
SEVERAL = row("<image>which of <image> both?", "left", "the right one", picture(120, 50, 3), picture(48, 100, 4))
NONE = row("say hello", "hello", "good bye")
# what each cannot take is its processor's or its forward pass's own limit: several images, or a text without any
ONE_IMAGE_EACH = {"got_ocr2", "perception_lm"}
NEVER_WITHOUT = {"pp_chart2table"}
# why a family is refused, in words of its message
REFUSED = {
    "emu3": "discrete tokens",
    "chameleon": "discrete tokens",
    "blip-2": "query transformer",
    "instructblip": "query transformer",
    "mllama": "cross-attention",
    "idefics": "by cross-attention",
    "florence2": "encoder-decoder",
    "t5gemma2": "encoder-decoder",
    "git": "has no image token",
    "gemma4_unified": "has no vision tower: patches",
    "apertus1p5": "discrete tokens",
    "kosmos-2": "mask along the prompt",
    "kosmos-2.5": "mask along the prompt",
    "blip": "cross-attention",
    "nemotron_h_omni": "no base model below its head",
    # the same token is given other distances in a row with others beside it
    "inkling2": "positions differ",
    "inkling2_loop": "positions differ",
}
# of families.md: no trees, because their layers are no attention or their mask is made inside
BY_ROW = {
    *("lfm2_vl", "qwen3_5", "paligemma2", "qwen3_5_moe", "qwen4_exp", "lfm3_vl", "minicpm_ocr"),
    *("minicpmv4_6", "minicpmv4_7", "unlimited_ocr", "inkling_mm_model", "qwen3_omni_moe_thinker"),
    *("glm5_next", "hy_v4_vl", "dots3_note", "mistral_large4"),
}


def read(name: str, model: PreTrainedModel, processor: ProcessorMixin) -> ForestReading:
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    rows: list[Any] = [ONE, ANOTHER]
    if name not in ONE_IMAGE_EACH:
        rows.append(SEVERAL)
    if name not in NEVER_WITHOUT:
        rows.append(NONE)
    pairs = PairDataset(rows)
    return read_rows(model, adapter, processor, [pairs[position] for position in range(len(pairs))])


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_a_family_is_read_right_or_refused(name: str) -> None:
    if missing := zoo.missing_packages(name):
        pytest.skip(f"needs {', '.join(missing)}")
    model, processor = zoo.build(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logging.disable(logging.WARNING)
    try:
        if name in REFUSED:
            with pytest.raises(ModelError, match=REFUSED[name]):
                read(name, model, processor)
        else:
            reading = read(name, model, processor)
            assert (reading.no_trees is not None) == (name in BY_ROW), reading.no_trees
    finally:
        logging.disable(logging.NOTSET)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
