"""pass@k by enumeration, candidate sets by hand, and the branching factor against plain forward passes."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pivot_plugin.errors import SettingsError
from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.preferences import load_questions
from pivot_plugin.probes import candidate_set_sizes, pass_at_k, rollout_branching_factor
from tests.helpers import Tiny, picture


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k([c], n, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_problems_count_alike_whatever_their_samples() -> None:
    assert pass_at_k([1, 0, 4], [2, 8, 4], 1) == pytest.approx((0.5 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("correct", "samples", "k"), [([], 4, 1), ([5], 4, 1), ([1], 4, 5), ([1], 4, 0), ([1, 2], [3], 1), ([-1], 3, 1)]
)
def test_counts_that_do_not_go_together(correct: Any, samples: Any, k: int) -> None:
    with pytest.raises(SettingsError):
        pass_at_k(correct, samples, k)


def test_candidate_sets() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    assert candidate_set_sizes(shares.log(), 0.94).tolist() == [3, 1, 4]
    assert candidate_set_sizes(shares.log(), 0.5 + 1e-4).tolist() == [2, 1, 3]


def test_the_branching_factor_is_that_of_the_drawn_tokens(tiny: Tiny) -> None:
    model, processor = tiny
    questions = [
        {"images": [picture(60, 60, 1)], "question": "what?"},
        {"images": [picture(30, 60, 2)], "question": "and?"},
    ]
    found = rollout_branching_factor(model, questions, processor=processor, n=2, max_new_tokens=4)
    asked = load_questions(questions)
    engine = TransformersEngine(model, processor)
    drawn = engine._generated([asked[0], asked[1]], Sampling(2, 1.0, 1.0, 4), 0, output_logits=True)
    end = processor.tokenizer.eos_token_id
    sizes = []
    for row, sequence in enumerate(drawn.sequences.tolist()):
        for position, token in enumerate(sequence):
            shares = np.sort(drawn.logits[position][row].double().softmax(-1).numpy())[::-1]
            sizes.append(int(np.searchsorted(np.cumsum(shares), 0.95)) + 1)
            if token == end:
                break
    assert found == pytest.approx(np.mean(sizes), abs=0.01)
    assert 1 < found < len(processor.tokenizer)
