"""VQA accuracy: by kind, with rewards as judges, against generating one by one."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.probes import subject, vqa
from pivot_plugin.quickstart import world
from tests.helpers import picture


def test_the_world_s_questions_are_scored_as_one_by_one() -> None:
    model, processor = world.model(), world.processor()
    rows = world.question_rows(world.questions(24, seed=5, dusk=False))
    found = vqa(subject(model, processor), rows, **world.VQA_OPTIONS)
    right: dict[str, list[bool]] = {}
    for row in rows:
        text = processor.apply_chat_template(world.user_message(row["question"]), add_generation_prompt=True)
        inputs = processor(images=row["images"], text=text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right.setdefault(row["kind"], []).append(
            processor.tokenizer.decode(out, skip_special_tokens=True).strip() == row["answer"]
        )
    assert found.main.value == pytest.approx(np.mean([hit for hits in right.values() for hit in hits]))
    for kind, hits in right.items():
        assert found.scores[kind].value == pytest.approx(np.mean(hits)), kind
    assert 0 < found.main.value < 1


def test_batches_change_nothing(tiny: Any) -> None:
    rows = [
        {"image": picture(60 + 10 * n, 60, n), "question": f"what {n}?", "answer": "x", "kind": str(n % 2)}
        for n in range(5)
    ]
    who = subject(*tiny)
    alone = vqa(who, rows, batch_size=1, max_new_tokens=4)
    assert alone.artefacts == vqa(who, rows, batch_size=3, max_new_tokens=4).artefacts
    blind = ("other-picture", "mean-colour", "needs-picture")
    assert list(alone.scores) == [
        *("all", "0", "1"),
        *(f"{kind}/{how}" for how in blind for kind in ("all", "0", "1")),
    ]


def test_several_judges_are_averaged(llava: Any) -> None:
    rows = [{"image": picture(60, 60, 1), "question": "what?", "answer": "x"}]

    def half(completions: Any, **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    def full(completions: Any, **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    found = vqa(subject(*llava), rows, rewards=[half, full], max_new_tokens=2)
    assert found.main.value == pytest.approx(0.75)
    assert found.settings["judge"] == ["half", "full"]
    # one picture cannot be taken for another
    assert set(found.scores) == {"all", "all/mean-colour", "all/needs-picture"}


def test_the_blind_control_is_what_the_model_answers_to_the_replaced_pictures() -> None:
    """Against asking anew about pictures that were painted over by hand."""
    model, processor = world.model(), world.processor()
    rows = world.question_rows(world.questions(60, seed=5, dusk=False))
    found = vqa(subject(model, processor), rows, **world.VQA_OPTIONS)
    painted = []
    for row in rows:
        colour = np.asarray(row["images"][0]).reshape(-1, 3).mean(axis=0)
        flat = np.broadcast_to(np.round(colour).astype(np.uint8), (48, 48, 3))
        painted.append(row | {"images": [Image.fromarray(flat.copy())]})
    by_hand = vqa(subject(model, processor), painted, **world.VQA_OPTIONS, without=())
    assert set(by_hand.scores) == {"all", *{row["kind"] for row in rows}}
    for kind, score in by_hand.scores.items():
        assert score.value == found.scores[f"{kind}/mean-colour"].value, kind
    seen, other = found.scores["all"].samples, found.scores["all/other-picture"].samples
    flat = by_hand.scores["all"].samples
    assert found.scores["all/needs-picture"].value == np.mean((seen == 1) & (other == 0) & (flat == 0))
    # it sees by day, and what it says without seeing is worth less
    assert found.scores["all"].value > found.scores["all/mean-colour"].value + 0.1
    assert found.settings["p of being right as often without the picture"]["mean-colour"] < 0.05


def test_rows_without_pictures_have_no_blind_control(llava: Any) -> None:
    rows = [{"question": f"what {n}?", "answer": "x"} for n in range(3)]
    assert set(vqa(subject(*llava), rows, max_new_tokens=2).scores) == {"all"}


def test_what_cannot_be_asked_is_named_before_anything_is_generated(llava: Any) -> None:
    row = {"image": picture(60, 60, 1), "question": "what?"}
    with pytest.raises(DataError, match="row 0 of questions has no 'answer'"):
        vqa(subject(*llava), [row])
    with pytest.raises(SettingsError, match="no reward 'acuracy'"):
        vqa(subject(*llava), [row | {"answer": "x"}], rewards="acuracy")
    with pytest.raises(ModelError, match="VQA needs an MLLM"):
        vqa(subject(find_adapter(llava[0]).extract(), llava[1]), [row | {"answer": "x"}])
