"""The report: everything in one file, nothing from strangers as code, and readable in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pivot_plugin as pivot
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.generation.own_answers import AnswerSummary, Example
from pivot_plugin.preferences import audit
from pivot_plugin.probes import ProbeResult
from pivot_plugin.probes.comparison import Comparison
from pivot_plugin.probes.scores import score_of
from pivot_plugin.report import write_report
from pivot_plugin.report.pictures import overlay
from pivot_plugin.testing import build
from tests.helpers import picture, row

pytestmark = pytest.mark.training

PAIRS = [row(f"{n}?", f"yes {n}", "<script>alert(1)</script>", picture(60, 90, n)) for n in range(14)]
SETTINGS = {
    "max_steps": 4,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "eval_steps": 2,
    "disable_tqdm": True,
    "patience": None,
}


def shades(who: Any) -> dict[str, float]:
    return {"<b>odd</b>": 0.5, "plain": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a <run> & more"
    model, processor = build("llava")
    pivot.optimize(
        model,
        PAIRS[4:],
        processor=processor,
        eval_prefs=PAIRS[:4],
        output_dir=folder,
        probes={"shades": shades},
        probe_steps=[2],
        **SETTINGS,
    )
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    comparison = pivot.compare(
        {"before": build("llava")[0], "after <i>": run},
        {"shades": shades, "vague": lambda who: {"x": 0.25}},
        processor=build("llava")[1],
    )
    return write_report(run.parent / "report.html", [run], comparison)


def test_everything_stands_in_one_file(page: Path) -> None:
    text = page.read_text()
    for wanted in (
        "What was trained on what",
        "Encoders compared",
        "Probes before and after",
        "Curves",
        "Where the loss looks",
        "Cost",
        "Provenance",
        "preference accuracy",
        "probe: shades",
        "SFT before",
        "DPO after",
        "peak memory",
        "pairs per second",
        "transformers",
    ):
        assert wanted in text, wanted
    assert text.count("<article") == 4
    # five pictures of each: the image, and two maps before and after
    assert text.count("data:image/png;base64,") == 20
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"', text)
    assert "http" not in re.sub(r'xmlns(?::\w+)?="[^"]*"', "", text)


def test_what_strangers_wrote_is_text_and_no_code(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>odd" not in text and "&lt;b&gt;odd" in text
    assert "after &lt;i&gt;" in text
    assert "a &lt;run&gt; &amp; more" in text


def test_no_path_of_this_machine_is_in_the_page(page: Path) -> None:
    assert str(page.parent) not in page.read_text()
    assert str(Path.home()) not in page.read_text()


def test_an_audit_and_own_answers_and_words_are_shown(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with more"
    shutil.copytree(run, folder)
    record = json.loads((folder / "run.json").read_text())
    example = Example("what?", "a <b>cat</b>", "a dog", 1.0, 0.25)
    record["answers"] = [AnswerSummary(1234, 1000, 200, 30, 4, 0, 0, 1000, 0.75, 0.125, (example,)).as_dict()]
    (folder / "run.json").write_text(json.dumps(record))
    audit(build("llava")[0], PAIRS[:3], processor=build("llava")[1], max_new_tokens=3).save(folder)
    guesses, better = np.zeros(60), np.ones(60)
    compared = Comparison(
        {
            name: {
                "vqa": ProbeResult(
                    "vqa",
                    {
                        "all": score_of(right),
                        "all/mean-colour": score_of(right),
                        "all/needs-picture": score_of(guesses),
                    },
                )
            }
            for name, right in (("before", guesses), ("after", better))
        }
    )
    text = write_report(tmp_path / "page.html", [folder], compared).read_text()
    for wanted in (
        "The model's own answers",
        "1,000 (81 %)",
        "a &lt;b&gt;cat",
        "The pairs, before training",
        "3 pairs (prefs), 3 with pictures.",
        "gap to the model",
        "1.000 *\u2020",
        "needs-picture is what is right",
    ):
        assert wanted in text, wanted
    (folder / "audit.json").write_text("{")
    with pytest.raises(DataError, match="is no audit"):
        write_report(tmp_path / "page.html", [folder])


def test_a_run_that_is_not_finished_shows_its_last_checkpoint(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"finished": False, "settings": {"objective": "dpo", "train": "encoder"}})
    )
    state = {"global_step": 3, "log_history": [{"step": step, "loss": 0.7 - step / 10} for step in (1, 2, 3)]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    text = write_report(tmp_path / "cut.html", [folder]).read_text()
    assert "This run is not finished" in text
    assert "loss over optimiser steps" in text
    assert "3 steps" in text


def test_several_runs_are_drawn_together(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(run, second)
    text = write_report(tmp_path / "both.html", [run, second]).read_text()
    assert "second: What was trained on what" in text
    assert re.search(r'aria-label="loss over optimiser steps: a &lt;run&gt; .*second from', text)


def test_a_damaged_probe_is_left_out(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "damaged"
    shutil.copytree(run, copied)
    (copied / "probes" / "saliency" / "step-0.npz").write_bytes(b"half")
    (copied / "probes" / "shades" / "step-4.json").write_text('{"probe": ')
    assert "Provenance" in write_report(tmp_path / "damaged.html", [copied]).read_text()


def test_a_map_lies_where_it_was_measured() -> None:
    import numpy as np

    values = np.zeros((2, 2))
    values[1, 1] = 1
    drawn = overlay(Image.new("RGB", (80, 40), (128, 128, 128)), values, (0.25, 0.0, 0.75, 1.0))
    assert drawn.size == (168, 84)
    pixels = np.asarray(drawn).astype(int).sum(axis=2)
    assert pixels[10, 10] == 3 * 128  # outside of what the map covers the image stays
    hot = pixels[60, 110]
    assert all(hot > pixels[y, x] for y, x in ((20, 60), (20, 110), (60, 60)))


def test_a_path_that_cannot_be_written_is_named_before_anything_is_drawn(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a folder") as caught:
        write_report(tmp_path, [run])
    assert "report.html" in caught.value.remedy
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be made"):
        write_report(tmp_path / "file" / "report.html", [run])
    with pytest.raises(SettingsError, match="holds no run"):
        write_report(tmp_path / "report.html", [tmp_path])
    with pytest.raises(SettingsError, match="There is no run"):
        write_report(tmp_path / "report.html", [])


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("PIVOT_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_it_is_readable_and_accessible_in_a_browser(
    page: Path, browser: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.resolve().as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert not errors
    # no sideways scrolling of the page, on a phone either
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt.length > 5)")
    violations = Axe().run(tab).response["violations"]
    assert not violations, [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in violations]
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as shown:
        assert shown.width == width
        corner = shown.convert("L").getpixel((2, 2))
        assert (corner > 128) == (scheme == "light")
    tab.close()


def test_it_can_be_printed(page: Path, browser: Any, tmp_path: Path) -> None:
    tab = browser.new_page()
    tab.goto(page.resolve().as_uri())
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    tab.close()
