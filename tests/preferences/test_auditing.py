"""The audit of pairs: every number against a plain pass, and pairs whose answer to it is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.data.blind import WithoutPicture
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.preferences import AuditReport, audit, keep, load
from pivot_plugin.preferences.auditing import word_margins
from pivot_plugin.quickstart import scenes, world
from tests.helpers import Tiny, picture, row

PAIRS = [
    row("what is it?", "a red cat", "a red dog!", picture(60, 60, 1)),
    row("where?", "here", "over there", picture(60, 60, 1)),
    row("<image>which of <image> both?", "left", "the right one", picture(120, 50, 2), picture(48, 100, 3)),
    row("say hello", "hello", "good bye"),
]


def plain(tiny: Tiny, pair: dict[str, Any], answer: str) -> tuple[float, int]:
    """Log-probability of an answer and its tokens, by the model's own pass over one sequence."""
    model, processor = tiny
    messages = prepare_multimodal_messages(pair["prompt"], images=list(pair["images"]))
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = {"images": [pair["images"]]} if pair["images"] else {}
    inputs = processor(**images, text=[text], add_special_tokens=False, return_tensors="pt")
    closed = processor.apply_chat_template(
        [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], tokenize=False
    )
    tokens = processor.tokenizer(closed[len(text) :], add_special_tokens=False)["input_ids"]
    length = inputs["input_ids"].shape[1]
    for name, filler in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            behind = torch.tensor([tokens if filler is None else [filler] * len(tokens)])
            inputs[name] = torch.cat([inputs[name], behind], dim=1)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, length - 1 : -1]
    logps = logits.log_softmax(dim=-1)[torch.arange(len(tokens)), tokens]
    return float(logps.sum()), len(tokens)


def test_every_number_is_that_of_a_plain_pass(tiny: Tiny) -> None:
    report = audit(tiny[0], PAIRS, processor=tiny[1], max_new_tokens=5, batch_size=3)
    rows = load(PAIRS).verify()
    versions = {
        "margin": rows,
        "margin_other": WithoutPicture(rows, "other"),
        "margin_mean": WithoutPicture(rows, "mean"),
    }
    texts = [(pair["chosen"], pair["rejected"]) for pair in PAIRS]
    for position, (of_pair, (chosen, rejected)) in enumerate(zip(report.pairs, texts, strict=True)):
        for name, version in versions.items():
            if name != "margin" and not of_pair.pictures:
                assert getattr(of_pair, name) is None
                continue
            (good, first), (bad, second) = (
                plain(tiny, version[position], text[0]["content"] if isinstance(text, list) else text)
                for text in (chosen, rejected)
            )
            assert getattr(of_pair, name) == pytest.approx(good - bad, abs=2e-3), (position, name)
            if name == "margin":
                assert of_pair.chosen == pytest.approx(good / first, abs=1e-3)
                assert of_pair.rejected == pytest.approx(bad / second, abs=1e-3)
        own, length = plain(tiny, rows[position], of_pair.own_answer)
        assert of_pair.own == pytest.approx(own / length, abs=1e-3)
        if of_pair.pictures:
            blind = (of_pair.margin_other, of_pair.margin_mean)
            assert of_pair.picture_share == pytest.approx(of_pair.margin - sum(blind) / 2)
            assert of_pair.guessable == (min(blind) > 0)
    assert [of_pair.pictures for of_pair in report.pairs] == [True, True, True, False]


def test_pairs_of_pictures_are_held_against_each_other_by_plain_passes(make: Any) -> None:
    tiny = make("qwen2_5_vl")
    pairs = [
        PAIRS[0] | {"rejected_images": [picture(90, 40, 7)]},
        row("what is it?", "a red cat", "a red cat", picture(60, 60, 1)) | {"rejected_images": [picture(60, 60, 2)]},
        PAIRS[3],
    ]
    report = audit(tiny[0], pairs, processor=tiny[1], max_new_tokens=3)
    shown = load(pairs).verify()
    elsewhere = [{**shown[n], "images": shown[n]["rejected_images"]} for n in (0, 1)]
    margins = [plain(tiny, shown[n], "a red cat")[0] - plain(tiny, elsewhere[n], "a red cat")[0] for n in (0, 1)]
    assert [of_pair.image_margin for of_pair in report.pairs[:2]] == pytest.approx(margins, abs=2e-3)
    assert report.pairs[2].image_margin is None
    # two answers are held against each other about the pair's own picture; of one the pictures decide
    answers = plain(tiny, shown[0], "a red cat")[0] - plain(tiny, shown[0], "a red dog!")[0]
    assert report.pairs[0].margin == pytest.approx(answers, abs=2e-3)
    assert report.pairs[1].margin == pytest.approx(margins[1], abs=2e-3)
    assert report.pairs[1].blind_margin == pytest.approx(0, abs=1e-4)
    assert report.pairs[1].guessable is False
    assert report.summary()["pictures told apart"] == np.mean([margin > 0 for margin in margins])
    assert "Of 2 with rejected pictures" in str(report)


def said(scene: scenes.Scene, chosen: str, rejected: str) -> dict[str, Any]:
    return row(world.CAPTION_PROMPT, chosen, rejected, scene.image)


def test_pairs_that_can_be_guessed_are_told_from_those_that_must_be_seen() -> None:
    """By day the model of the embedded world sees: kinds of pairs whose answer to the audit is known."""
    pictures = scenes.render_many(24, seed=3)
    captions = [scene.caption() for scene in pictures]
    others = captions[1:] + captions[:1]
    seen = [said(scene, own, other) for scene, own, other in zip(pictures, captions, others, strict=True)]
    # words in an order that no caption has
    guessable = [
        said(scene, own, " ".join(reversed(own.split()))) for scene, own in zip(pictures, captions, strict=True)
    ]
    model, processor = world.model(), world.processor()
    by_eye, by_form = (audit(model, pairs, processor=processor, max_new_tokens=13) for pairs in (seen, guessable))
    assert by_eye.summary()["told apart"] > 0.8
    assert by_eye.summary()["guessed without the picture"] < 0.9
    assert by_form.summary()["guessed without the picture"] == 1.0
    assert by_eye.summary()["median share of the picture"] > 2
    kept = keep(seen + guessable, audit(model, seen + guessable, processor=processor), blind_margin_below=5.0)
    ids = {pair["chosen"][0]["content"][0]["text"] for pair in (kept[n] for n in range(len(kept)))}
    assert len(kept) >= 10
    assert ids <= set(captions)
    assert all(kept[n]["rejected"][0]["content"][0]["text"] in captions for n in range(len(kept)))
    printed = str(by_form)
    assert "100 % of those with pictures are told apart without theirs" in printed
    assert printed.splitlines()[-4].startswith("  with the picture")


def test_words_alone_tell_apart_what_can_be_learnt_without_looking() -> None:
    rng = np.random.default_rng(0)
    colours = ["red", "green", "blue", "grey"]
    fair = [tuple(rng.permutation(colours)[:2]) for _ in range(400)]
    assert (word_margins(fair) > 0).mean() < 0.6
    biased = [(chosen, "no") for chosen, _ in fair]
    assert (word_margins(biased) > 0).all()
    # by hand: of the other two pairs "yes" is chosen twice, "no" rejected once, "maybe" rejected once
    by_hand = word_margins([("yes", "no"), ("yes", "no"), ("yes yes", "maybe")])
    assert by_hand == pytest.approx([np.log(4 / 1) - np.log(1 / 2), np.log(4) + np.log(2), 2 * np.log(3) - np.log(1)])
    # a pair does not testify for itself
    assert word_margins([("yes", "no")]).tolist() == [0.0]


def test_an_audit_goes_to_disk_and_back(llava: Tiny, tmp_path: Path) -> None:
    report = audit(llava[0], PAIRS, processor=llava[1], max_new_tokens=3)
    assert AuditReport.load(report.save(tmp_path)) == AuditReport.load(tmp_path / "audit.json")
    assert AuditReport.load(tmp_path).pairs == report.pairs
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="is no audit"):
        AuditReport.load(tmp_path / "broken.json")


def test_bounds_keep_what_is_within_them(llava: Tiny) -> None:
    report = audit(llava[0], PAIRS, processor=llava[1], max_new_tokens=3)
    middle = float(np.median(report.column("margin")))
    below, above = keep(PAIRS, report, margin_below=middle), keep(PAIRS, report, margin_above=middle)
    assert len(below) == len(above) == 2
    expected = [position for position, pair in enumerate(report.pairs) if pair.margin < middle]
    assert [below.plain(n)["prompt"] for n in range(2)] == [load(PAIRS).plain(p)["prompt"] for p in expected]
    # a pair without a picture is within no bound about pictures
    assert len(keep(PAIRS, report, picture_share_above=-1e9)) == 3
    with pytest.raises(DataError, match="None of 4 pairs is left: margin_below=-1e\\+09 leaves 0, chosen_gap_below"):
        keep(PAIRS, report, margin_below=-1e9, chosen_gap_below=1e9)
    with pytest.raises(DataError, match="The audit is of 4 other pairs"):
        keep(PAIRS[::-1], report, margin_below=0)
    with pytest.raises(SettingsError, match="No bound is given"):
        keep(PAIRS, report)
    with pytest.raises(SettingsError, match="batch_size is 0"):
        audit(llava[0], PAIRS, processor=llava[1], batch_size=0)


def test_pairs_without_pictures_are_said_to_teach_no_tower(llava: Tiny) -> None:
    report = audit(llava[0], PAIRS[3:], processor=llava[1], max_new_tokens=3)
    assert "Without pictures nothing here can teach a vision tower." in str(report)
