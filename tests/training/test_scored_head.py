"""The head in slices against the head at once: the same numbers and gradients, whatever the head does to its logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import add_fused_lm_head

from pivot_plugin.models.find import find_adapter
from pivot_plugin.training import forward, scored_head
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.scored_head import ScoredHead, slice_of
from tests.helpers.peaks import LargestTensor
from tests.helpers.training import normal

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def log_probs_and_gradient(model: Any, batch: Any, reading: forward.ForestReading) -> list[torch.Tensor]:
    model.zero_grad()
    with forward.answering(model, find_adapter(model), reading):
        answer = model(forest=batch)
        answer.log_probs.sin().sum().backward()
    tower = find_adapter(model).tower
    gradients = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
    return [answer.log_probs.detach(), *gradients]


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("setting", [{}, {"final_logit_softcapping": 0.5}, {"logit_scale": 0.25}], ids=str)
def test_slices_of_any_head_are_the_whole(
    llava: Any, rows: Any, own_head: bool, setting: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    for name, value in setting.items():
        setattr(model.config.get_text_config(), name, value)
    if own_head:
        _cap(model, **setting)
    model.get_output_embeddings().requires_grad_(False)
    batch = ForestCollator(processor, find_adapter(model).image_token_id)(normal(rows[:4]))["forest"]
    reading = forward.reading_of(model)
    reading = replace(reading, own_head=own_head)
    sizes: list[int | None] = []
    results = []
    for size in (None, 3):
        monkeypatch.setattr(scored_head, "slice_of", lambda *_, size=size: sizes.append(size) or size)
        results.append(log_probs_and_gradient(model, batch, reading))
    assert sizes == [None, 3]
    assert len(results[0]) > 1
    for whole, sliced in zip(*results, strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-6)


def _cap(model: Any, final_logit_softcapping: float = 0.0, logit_scale: float = 1.0) -> None:
    """Let the model's own head do what its configuration says, which LLaVA's does not."""

    def change(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits * logit_scale
        return (
            final_logit_softcapping * (scaled / final_logit_softcapping).tanh() if final_logit_softcapping else scaled
        )

    model.get_output_embeddings().register_forward_hook(change)


def test_a_capped_head_is_the_same_by_trl_and_by_itself(llava: Any, rows: Any) -> None:
    model, processor = llava
    model.config.get_text_config().final_logit_softcapping = 0.5
    batch = ForestCollator(processor, find_adapter(model).image_token_id)(normal(rows[:4]))["forest"]
    reading = forward.reading_of(model)
    with torch.no_grad():
        with forward.answering(model, find_adapter(model), reading):
            by_trl = model(forest=batch).log_probs
        _cap(model, 0.5)
        with forward.answering(model, find_adapter(model), replace(reading, own_head=True)):
            by_itself = model(forest=batch).log_probs
    torch.testing.assert_close(by_itself, by_trl, rtol=1e-5, atol=1e-6)


class Headed(nn.Module):
    """As much of a model as a head has to do with."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.base_model = nn.Identity()
        self.head = nn.Linear(width, words, bias=False).requires_grad_(False)
        self.config: Any = type("Config", (), {"get_text_config": lambda self: self})()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **inputs: Any) -> Any:
        states = self.base_model(**inputs)[0]
        return type("Output", (), {"logits": self.head(states)})()


@pytest.mark.parametrize("own_head", [False, True])
def test_no_tensor_of_all_edges_by_all_words_exists(own_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words, edges, width = 152_064, 96, 8
    torch.manual_seed(0)
    model: Any = Headed(words, width)
    plain = model.forward
    add_fused_lm_head(model, outputs=OUTPUTS)
    # less than is allowed, so that there are slices of few edges
    monkeypatch.setattr(scored_head, "SLICE_BYTES", scored_head.SLICE_BYTES // 8)
    states = torch.randn(1, edges, width, requires_grad=True)
    tokens = torch.randint(0, words, (1, edges))
    head = ScoredHead(model, plain if own_head else model.forward, {}, own_head)
    with LargestTensor() as largest:
        head.scored(BaseModelOutput(states), states, tokens).log_probs.sum().backward()
    assert largest.bytes <= max(scored_head.SLICE_BYTES, words * width * 4), largest.shape
    assert largest.bytes < edges * words * 4 / 8
    expected = states.grad
    own = states.detach().requires_grad_(True)
    model.head(own).log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()
    torch.testing.assert_close(expected, own.grad, rtol=1e-4, atol=1e-5)


def test_a_head_that_trains_scores_all_at_once_and_a_frozen_one_what_fits(llava: Any) -> None:
    model, _ = llava
    model.get_output_embeddings().requires_grad_(True)
    assert slice_of(model, own_head=False) is None, "its gradient is as large as itself, in every call"
    model.get_output_embeddings().requires_grad_(False)
    words = model.get_output_embeddings().weight.shape[0]
    assert slice_of(model, own_head=False) == scored_head.SLICE_BYTES // (scored_head.UNFUSED * words * 4)
