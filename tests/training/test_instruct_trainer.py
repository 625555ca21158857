"""Conversations in batches: token by token what TRL makes of them, with every answer in the loss and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, ModelError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import load_conversations
from pivot_plugin.testing import zoo
from pivot_plugin.training.conversation_batch import IGNORED, ConversationCollator
from tests.helpers import Tiny, picture

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def collator(tiny: Tiny, **options: Any) -> ConversationCollator:
    model, processor = tiny
    return ConversationCollator(processor, find_adapter(model).image_token_id, **options)


def rows(*said: list[tuple[str, str]], images: int = 1) -> list[dict[str, Any]]:
    given = [
        {
            "id": f"row {n}",
            "images": [picture(40 + 10 * n, 50, 7 * n + k) for k in range(images)],
            "conversations": [{"from": speaker, "value": words} for speaker, words in turns],
        }
        for n, turns in enumerate(said)
    ]
    data = load_conversations(given)
    return [data[n] for n in range(len(data))]


ONE_TURN = ([("human", "what?"), ("gpt", "a cat")], [("human", "how many are there?"), ("gpt", "two")])
TWO_TURNS = (
    [("human", "what?"), ("gpt", "a cat"), ("human", "sure?"), ("gpt", "yes, quite")],
    [("system", "be brief"), ("human", "what?"), ("gpt", "a dog")],
)


def test_single_turns_are_what_trl_makes_of_prompt_and_completion(tiny: Tiny) -> None:
    given = rows(*ONE_TURN)
    theirs = DataCollatorForVisionLanguageModeling(tiny[1], completion_only_loss=True)(
        [{"images": r["images"], "prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in given]
    )
    ours = collator(tiny)(given)
    assert ours.pop("row_ids") == ["row 0", "row 1"]
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers marks answers of images' rows from 5.18"
)
def test_several_turns_are_what_trl_makes_of_a_template_that_marks_answers(make: Callable[[str], Tiny]) -> None:
    model, processor = make("llava")
    processor.chat_template = MARKED
    given = rows(*TWO_TURNS)
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(
        [{"images": r["images"], "messages": [dict(m) for m in r["messages"]]} for r in given]
    )
    ours = collator((model, processor))(given)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["labels"], theirs["labels"])


def answers_of(batch: dict[str, Any], tiny: Tiny) -> list[str]:
    tokenizer = tiny[1].tokenizer
    return [tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]


WORDS = st.text(alphabet="abc d?", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), images=st.integers(0, 2))
def test_labels_spell_the_answers_of_all_turns(
    make: Callable[[str], Tiny], said: list[tuple[str, str]], images: int
) -> None:
    tiny = make("llava")
    turns = [(speaker, words) for pair in said for speaker, words in zip(("human", "gpt"), pair, strict=True)]
    batch = collator(tiny)(rows(turns, images=images))
    assert answers_of(batch, tiny) == ["".join(f"{answer}<|im_end|>\n" for _, answer in said)]
    places = batch["input_ids"][batch["labels"] != IGNORED]
    assert torch.equal(places, batch["labels"][batch["labels"] != IGNORED])


def test_a_plain_caption_has_no_question_and_ends_with_a_line_break(tiny: Tiny) -> None:
    token = find_adapter(tiny[0]).image_token_id
    batch = collator(tiny, plain=True)(rows([("human", "describe"), ("gpt", "a cat")]))
    assert answers_of(batch, tiny) == ["a cat\n"]
    ids = batch["input_ids"][0]
    first = int((batch["labels"][0] != IGNORED).nonzero()[0])
    assert (ids[:first] == token).any()
    assert "describe" not in tiny[1].tokenizer.decode(ids)


def test_text_only_rows_stand_beside_rows_with_images(tiny: Tiny) -> None:
    both = [*rows([("human", "hi"), ("gpt", "yo")], images=0), *rows([("human", "what?"), ("gpt", "a cat")])]
    together = collator(tiny)(both)
    alone = collator(tiny)(both[1:])
    assert torch.equal(together["pixel_values"], alone["pixel_values"])
    assert answers_of(together, tiny) == ["yo<|im_end|>\n", "a cat<|im_end|>\n"]
    assert "pixel_values" not in collator(tiny)(both[:1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(side: str, tiny: Tiny) -> None:
    together = [
        *rows([("human", "what?"), ("gpt", "a cat that sleeps, and quite some more words")], images=1),
        *rows([("human", "hi"), ("gpt", "yo")], images=0),
        *rows([("human", "are they alike?"), ("gpt", "yes")], images=2),
        *rows([("human", "what?"), ("gpt", "a dog"), ("human", "sure?"), ("gpt", "no")], images=1),
    ]
    batch = collator(tiny)(together)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) == len(lengths)
    if side == "left":
        for name, values in batch.items():
            if isinstance(values, torch.Tensor) and values.shape == batch["input_ids"].shape:
                batch[name] = torch.stack([row.roll(-n) for row, n in zip(values, lengths, strict=True)])
    assert batch["attention_mask"][:, 0 if side == "right" else -1].all()
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        padded = answer_logps(tiny, batch)
        alone = [answer_logps(tiny, collator(tiny)([row]))[0] for row in together]
    for found, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def answer_logps(tiny: Tiny, batch: dict[str, Any]) -> list[torch.Tensor]:
    """For each row the log-probabilities of its answers' tokens, by the model's own forward."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_ids")}
    logps = tiny[0](**inputs).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return [row[kept] for row, kept in zip(picked, targets != IGNORED, strict=True)]


def test_two_images_in_one_row_keep_their_order(tiny: Tiny) -> None:
    row = rows([("human", "first <image> then <image>?"), ("gpt", "yes")], images=2)
    batch = collator(tiny)(row)
    turned = collator(tiny)([{**row[0], "images": row[0]["images"][::-1]}])
    assert torch.equal(batch["input_ids"], turned["input_ids"])
    assert not torch.equal(batch["pixel_values"], turned["pixel_values"])


def test_a_cut_ends_the_row_and_never_its_images(make: Callable[[str], Tiny], caplog: Any) -> None:
    tiny = make("llava")
    given = rows([("human", "what?"), ("gpt", "a cat that sleeps")])
    whole = collator(tiny)(given)
    last_image = int((whole["input_ids"][0] == find_adapter(tiny[0]).image_token_id).nonzero()[-1])
    cut = collator(tiny, max_length=whole["input_ids"].shape[1] - 5)(given)
    assert torch.equal(cut["labels"], whole["labels"][:, :-5])
    with pytest.raises(DataError, match=r"row 0.*cuts into its images"):
        collator(tiny, max_length=last_image)(given)
    caplog.clear()
    assert (collator(tiny, max_length=last_image + 2)(given)["labels"] == IGNORED).all()
    assert "leaves nothing of its answers" in caplog.text


def test_rows_can_be_padded_to_a_multiple(make: Callable[[str], Tiny]) -> None:
    tiny = make("llava")
    plain, padded = collator(tiny)(rows(*ONE_TURN)), collator(tiny, pad_to_multiple_of=16)(rows(*ONE_TURN))
    length = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] == -(-length // 16) * 16
    assert torch.equal(padded["labels"][:, :length], plain["labels"])
    assert (padded["labels"][:, length:] == IGNORED).all()


def test_a_template_that_rewrites_earlier_turns_is_refused(make: Callable[[str], Tiny]) -> None:
    model, processor = make("llava")
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}<image>Q{% elif loop.last %}thought A"
        "{% else %}A{% endif %}{% endfor %}"
    )
    with pytest.raises(ModelError, match="writes a turn differently once another follows"):
        collator((model, processor))(rows([("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]))


@pytest.mark.training
def test_a_mixture_that_names_its_experts_otherwise_has_its_load_balanced(tmp_path: Path) -> None:
    """TRL asks the configuration for `num_experts`; GLM's has `n_routed_experts`, and keeps its own names."""
    model, processor = zoo.build("glm4v_moe")
    rows = [{"caption": f"it is {number}", "image": picture(60, 60, number)} for number in range(2)]
    settings: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    result = pivot.align(model, rows, processor=processor, output_dir=tmp_path / "run", **settings)
    assert max(entry.get("aux_loss", 0.0) for entry in result.history) > 0
    assert "num_experts" not in model.config.get_text_config().to_dict()
