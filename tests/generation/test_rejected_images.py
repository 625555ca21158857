"""Makers of rejected pictures: what they make, that the same is made again, and what gives it away."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import pivot_plugin as pivot
from pivot_plugin import PivotConfig, PivotTrainer, hooks, objectives
from pivot_plugin.data.pixels import pixel_statistics, told_apart
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.generation.makers import Draw, Maker
from pivot_plugin.preferences import PairStream, check, load, save, with_rejected_images
from tests.helpers import picture
from tests.helpers.training import settings

MAKERS = ("other_picture", "patch_shuffle", "region_blackout", "crop")


def photograph(seed: int) -> Image.Image:
    """A picture with soft grounds, shapes, grain, and a size, a sharpness and a light of its own."""
    rng, numbers = np.random.default_rng(seed), random.Random(seed)
    width, height = numbers.choice([(96, 64), (64, 96), (80, 80)])
    ground = rng.integers(20, 236, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    for _ in range(numbers.randint(2, 7)):
        left, top = numbers.randrange(width), numbers.randrange(height)
        box = (left, top, left + numbers.randint(6, 40), top + numbers.randint(6, 40))
        colour = tuple(numbers.randrange(256) for _ in range(3))
        numbers.choice([canvas.ellipse, canvas.rectangle])(box, fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(numbers.uniform(0.2, 0.9)))
    grain = rng.normal(0, numbers.uniform(3, 7), (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def rows_of(images: list[Image.Image]) -> list[dict[str, Any]]:
    return [
        {"images": [image], "prompt": "what?", "chosen": f"the {number}th", "rejected": f"not the {number}th"}
        for number, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [photograph(seed) for seed in range(160)]


@pytest.mark.parametrize(("make", "told"), [("other_picture", False), *((name, True) for name in MAKERS[1:])])
def test_pixel_statistics_tell_what_was_cut_or_painted_and_no_other_picture(
    make: str, told: bool, photographs: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    """The warning of S-VCO: such pictures teach what is unnatural. Said by the check of pairs."""
    report = check(with_rejected_images(rows_of(photographs), make, difficulty=0.3))
    assert ("rejected images are told by their pixels" in {defect.kind for defect in report.defects}) == told
    share = report.statistics["rejected_images_told_by_pixels"]
    assert share > 0.65 if told else 0.38 < share < 0.6
    assert ("other_picture" in str(report)) == told


def test_the_statistic_is_at_chance_on_pictures_of_one_kind_and_sure_of_pictures_of_two() -> None:
    """With the interval that Wilson's formula gives for the share of pairs."""
    measured = [pixel_statistics(photograph(seed)) for seed in range(1000, 1240)]
    same = told_apart(list(zip(measured[:120], measured[120:], strict=True)))
    assert same is not None and not same.beyond_chance and same.low < 0.5 < same.high
    dark = [pixel_statistics(photograph(seed).point(lambda value: value // 4)) for seed in range(1000, 1120)]
    apart = told_apart(list(zip(measured[:120], dark, strict=True)))
    assert apart is not None and apart.share > 0.95
    z, n, p = 1.959964, 120, apart.share
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (apart.low, apart.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert told_apart(list(zip(measured[:39], measured[40:79], strict=True))) is None


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_is_made_again_in_any_order_and_other_seeds_make_others(
    make: str, photographs: list[Image.Image]
) -> None:
    rows = rows_of(photographs[:12])

    def made(rows: list[dict[str, Any]], seed: int = 0) -> dict[str, bytes]:
        pairs = with_rejected_images(rows, make, seed=seed)
        images = [pairs[position] for position in range(len(pairs))]
        return {pair["chosen"][0]["content"][0]["text"]: pair["rejected_images"][0].tobytes() for pair in images}

    first = made(rows)
    if make != "other_picture":
        # another picture is one of those there are, in their order
        assert made(rows[::-1]) == first
    assert made(rows) == first
    assert sum(made(rows, seed=1)[name] != first[name] for name in first) > 6
    assert all(first[name] != image.tobytes() for name, image in zip(first, photographs[:12], strict=True))


def test_what_each_maker_makes(photographs: list[Image.Image]) -> None:
    """Looked at in the pixels, by other means than those that made them."""
    images = photographs[:10]
    made = {make: with_rejected_images(rows_of(images), make, difficulty=0.5) for make in MAKERS}
    contents = {image.tobytes() for image in images}
    for position, image in enumerate(images):
        rejected = {make: pairs[position]["rejected_images"][0] for make, pairs in made.items()}
        assert rejected["other_picture"].tobytes() in contents - {image.tobytes()}
        before, shuffled = (np.asarray(one).reshape(-1, 3) for one in (image, rejected["patch_shuffle"]))
        # at most a tile's remainder is cut off, nothing is added
        assert len(shuffled) > 0.8 * len(before)
        assert {tuple(pixel) for pixel in shuffled} <= {tuple(pixel) for pixel in before}
        black = np.asarray(rejected["region_blackout"])
        changed = (black != np.asarray(image)).any(axis=2)
        assert not black[changed].any()
        assert 0.3 < changed.mean() < 0.5
        assert rejected["crop"].size == image.size
    easy, hard = (
        with_rejected_images(rows_of(images), "region_blackout", difficulty=difficulty) for difficulty in (0.0, 1.0)
    )
    shares = [
        (np.asarray(pairs[0]["rejected_images"][0]) != np.asarray(images[0])).any(axis=2).mean()
        for pairs in (easy, hard)
    ]
    assert shares[0] > 0.6 > 0.2 > shares[1]


def test_a_harder_other_picture_is_one_that_looks_more_alike(photographs: list[Image.Image]) -> None:
    def distance(difficulty: float) -> float:
        pairs = with_rejected_images(rows_of(photographs[:60]), "other_picture", difficulty=difficulty)
        both = [(pairs[n]["images"][0], pairs[n]["rejected_images"][0]) for n in range(60)]
        small = [[np.asarray(image.resize((8, 8)), dtype=float) for image in images] for images in both]
        return float(np.mean([np.abs(one - other).mean() for one, other in small]))

    assert distance(1.0) < 0.92 * distance(0.0)


def test_questions_about_one_picture_share_the_one_that_is_made_and_given_ones_stay(
    photographs: list[Image.Image],
) -> None:
    rows = rows_of([photographs[0], photographs[0], photographs[1], photographs[2]])
    rows[2]["rejected_images"] = [photographs[9]]
    rows.append({"prompt": "hello", "chosen": "a", "rejected": "b"})
    pairs = with_rejected_images(rows, "crop").verify()
    assert pairs[0]["rejected_image_key"] == pairs[1]["rejected_image_key"]
    assert pairs[2]["rejected_images"][0].tobytes() == photographs[9].tobytes()
    assert "rejected_images" not in pairs[4]


def test_another_picture_is_never_one_that_is_held_out(photographs: list[Image.Image], tmp_path: Path) -> None:
    pairs = load(rows_of(photographs[:40])).verify()
    train = with_rejected_images(pairs.select(range(30)), "other_picture", difficulty=0.0).verify()
    assert not set(train.rejected_image_keys) & set(pairs.image_keys[30:])
    save(train.select(range(3)), tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint() == train.select(range(3)).fingerprint()


def test_what_cannot_be_made_is_refused_by_name(photographs: list[Image.Image]) -> None:
    with pytest.raises(SettingsError, match=r"no maker 'crob'.*crop"):
        with_rejected_images(rows_of(photographs[:2]), "crob")
    with pytest.raises(SettingsError, match=r"no maker 'crob'"):
        # before a model is looked for
        pivot.optimize("no/model", rows_of(photographs[:2]), objective="mdpo", rejected_images="crob")
    with pytest.raises(SettingsError, match=r"difficulty is 1\.5"):
        with_rejected_images(rows_of(photographs[:2]), "crop", difficulty=1.5)
    with pytest.raises(DataError, match=r"shows 1 different picture.*needs 2"):
        with_rejected_images(rows_of([photographs[0]] * 3), "other_picture")
    plain = rows_of([Image.new("RGB", (40, 40), (9, 9, 9)), photographs[0]])
    with pytest.raises(DataError, match=r"row 0 of prefs: no rejected image can be made by 'patch_shuffle'.*itself"):
        with_rejected_images(plain, "patch_shuffle").verify()
    small = rows_of([picture(8, 8, 1), photographs[0]])
    with pytest.raises(DataError, match=r"row 0 of prefs.*8 x 8 pixels are too few"):
        with_rejected_images(small, "crop").verify()


def test_a_plugin_s_maker_is_found_by_its_name(photographs: list[Image.Image]) -> None:
    def grey(draw: Draw) -> object:
        return draw.picture.open().convert("L").convert("RGB")

    class Mine:
        @hooks.hookimpl
        def pivot_makers(self) -> Any:
            return {"grey": Maker("grey", "ours", rejected=grey)}

    hooks.manager().register(Mine(), "mine")
    try:
        pairs = with_rejected_images(rows_of(photographs[:2]), "grey")
        assert pairs[0]["rejected_images"][0].tobytes() == photographs[0].convert("L").convert("RGB").tobytes()
    finally:
        hooks.manager().unregister(name="mine")


@pytest.mark.training
def test_a_run_has_them_made_apart_for_what_trains_and_what_is_held_out(
    make: Callable[[str], Any],
    photographs: list[Image.Image],
    fast: dict[str, Any],
) -> None:
    model, processor = make("llava")
    rows = rows_of(photographs[:48])
    result = pivot.optimize(
        model,
        rows,
        processor=processor,
        objective="mdpo",
        rejected_images="region_blackout",
        rejected_difficulty=0.2,
        eval_fraction=0.2,
        **{**fast, "max_steps": 2},
    )
    assert result.settings["rejected_images"] == "region_blackout"
    assert {"image_accuracy", "image_margin"} <= result.metrics["after"].keys()


def test_a_run_says_where_made_pictures_look_made_and_refuses_streams(
    llava: Any, photographs: list[Image.Image], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trainer(rows: Any, **more: Any) -> PivotTrainer:
        preset = {**objectives.resolve("mdpo"), "rejected_images": "region_blackout", **more}
        config = PivotConfig(**settings(tmp_path, **preset, per_device_train_batch_size=16))
        return PivotTrainer(llava[0], config, rows, processing_class=llava[1], lora=4)

    trainer(rows_of(photographs[:48]), rejected_difficulty=0.0)
    assert "Pixel statistics alone tell" in caplog.text
    with pytest.raises(SettingsError, match="given for a stream"):
        trainer(PairStream(rows_of(photographs[:4])))
