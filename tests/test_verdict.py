"""The verdict: one set of words for card, terminal, report and notebook."""

import json

import pytest

from pivot_plugin.verdict import Change, Verdict, is_constant, words_of

RISE = Change(0.675, 0.815, 0.08, 0.20, 0.001, 500)
NOISE = Change(0.5, 0.53, -0.04, 0.10, 0.4, 32)
ACCURACY = {"measure": "preference accuracy", "chance": 0.5, "taken": 40, "planned": 40}


@pytest.mark.parametrize(
    ("verdict", "outcome", "title"),
    [
        (Verdict(change=RISE, **ACCURACY), "better", "Better"),
        (Verdict(change=Change(0.8, 0.7, -0.15, -0.05, 0.001, 500), **ACCURACY), "worse", "Worse"),
        (Verdict(change=NOISE, **ACCURACY), "no change", "Not decidable with so few rows"),
        (Verdict(change=Change(0.5, 0.51, -0.01, 0.03, 0.4, 900), **ACCURACY), "no change", "No change beyond noise"),
        (Verdict(taken=3, planned=3), "not measured", "Not measured"),
        # whatever was measured: weights that have not moved are no gain
        (Verdict(change=RISE, moved=False, kept=0, **ACCURACY), "no change", "Nothing was learnt"),
        (Verdict(change=RISE, blind=Change(0.6, 0.7, 0.05, 0.15, 0.01, 256), **ACCURACY), "better", None),
    ],
)
def test_an_outcome_has_one_title(verdict: Verdict, outcome: str, title: str | None) -> None:
    assert verdict.outcome == outcome
    assert verdict.title == (title or "Better, with and without the picture")
    assert str(verdict).startswith(f"{verdict.title}. ")


def test_of_a_loss_less_is_better_and_the_model_is_what_is_spoken_of() -> None:
    loss = {"measure": "loss", "lower_is_better": True, "subject": "model", "rows_are": "conversations"}
    fall = Change(3.0, 2.5, -0.6, -0.4, 0.001, 500)
    assert Verdict(change=fall, **loss).outcome == "better"
    assert Verdict(change=Change(2.5, 3.0, 0.4, 0.6, 0.001, 500), **loss).outcome == "worse"
    assert "500 held-out conversations: 3.000 before, 2.500 after" in str(Verdict(change=fall, **loss))
    assert "whether the model is better" in str(Verdict(subject="model"))
    assert Verdict.from_dict(json.loads(json.dumps(Verdict(change=fall, **loss).as_dict()))) == Verdict(
        change=fall, **loss
    )


def test_by_how_much_of_how_many_against_what_chance_is_said() -> None:
    told = str(Verdict(change=RISE, **ACCURACY))
    for words in ("500 held-out pairs", "0.675 before, 0.815 after", "+0.140", "+0.080 to +0.200", "chance 0.5"):
        assert words in told
    assert "below chance" not in told
    below = Change(0.317, 0.6, 0.2, 0.35, 0.001, 300)
    assert "began below chance" in str(Verdict(change=below, **ACCURACY))
    assert "less than about 0.094 cannot be told" in str(Verdict(change=Change(0.5, 0.5, 0, 0, 1.0, 32), **ACCURACY))


def test_what_needs_the_picture_is_told_from_words() -> None:
    none, half = Change(0.5, 0.51, -0.02, 0.04, 0.6, 256), Change(0.5, 0.57, 0.03, 0.11, 0.01, 256)
    assert "the gain needs the picture" in str(Verdict(change=RISE, blind=none, **ACCURACY))
    of_words = Verdict(change=RISE, blind=half, **ACCURACY)
    assert of_words.of_words and "there without the picture" in str(of_words)


def test_a_bit_equal_encoder_comes_first_and_an_early_stop_names_its_option() -> None:
    same = Verdict(moved=False, kept=0, change=NOISE, **ACCURACY)
    assert same.sentences()[0].startswith("The encoder is bit-equal to the one before: no look")
    assert "rate of 0" in Verdict(moved=False).sentences()[0]
    stopped = Verdict(taken=16, planned=40, kept=4, stopped_early=True, without_image=(3, 40))
    told = str(stopped)
    assert "step 16 of 40" in told and "--set patience=none" in told and "weights of step 4" in told
    assert "3 of the 40 rows trained on show no picture" in told


def test_a_verdict_comes_back_from_json_and_nonsense_is_none() -> None:
    verdict = Verdict(change=RISE, blind=NOISE, without_image=(1, 2), kept=4, **ACCURACY)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.as_dict()))) == verdict
    for nonsense in (None, {}, "better", {"change": 3}, {"change": {"before": "x"}}, {"taken": "many", "kept": "x"}):
        found = Verdict.from_dict(nonsense)  # type: ignore[arg-type]
        assert found is None or isinstance(str(found), str)
    strange = json.loads(json.dumps(verdict.as_dict())) | {"change": {**verdict.as_dict()["change"], "before": "high"}}
    assert Verdict.from_dict(strange) is None


def test_scores_of_probes_have_words_and_constants_are_known() -> None:
    assert words_of("dpo/concentration").startswith("DPO loss: gradient gathered")
    assert words_of("of a plugin") == "of a plugin"
    assert is_constant("sft/area") and is_constant("recall/spread")
    assert not is_constant("recall") and not is_constant("dpo/energy")
