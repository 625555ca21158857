"""The record of what every family gives: README and the documents are made of it, and every family is asked again."""

import logging
from pathlib import Path

import pytest

from pivot_plugin.testing import zoo_findings
from pivot_plugin.testing.zoo_findings import (
    FamilyFinding,
    all_names,
    between_marks,
    in_short,
    read_record,
    table,
    write_pages,
)

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests/testing/families.json"
README, PAGE = ROOT / "README.md", ROOT / "docs/families.md"
STALE = "run `make families`"
# of ../shared/families.md: every image-text-to-text family beside the built-in ones that could be built
FORTY_TWO = (
    *("vipllava", "fast_vlm", "deepseek_vl", "deepseek_vl_hybrid", "idefics3", "smolvlm", "granite4_vision"),
    *("llava_next_video", "video_llava", "kimi_k25", "video_llama_3", "exaone4_5", "mistral3", "lighton_ocr"),
    *("llava_pixtral", "aria", "lfm2_vl", "cohere2_vision", "emu3", "chameleon", "aya_vision", "gemma3", "ovis2"),
    *("molmo2", "glm4v", "glm46v", "glm_ocr", "qwen3_vl_moe", "qwen3_5", "paddleocr_vl", "gemma4", "idefics2"),
    *("janus", "blip-2", "instructblip", "paligemma", "paligemma2", "mllama", "got_ocr2", "perception_lm"),
    *("ernie4_5_vl_moe", "florence2"),
)


def test_the_record_has_every_family() -> None:
    assert set(read_record(RECORD)) == set(all_names()), STALE


def test_readme_and_the_documents_say_what_the_record_says() -> None:
    record = read_record(RECORD)
    for path, text in ((README, in_short(record)), (PAGE, table(record))):
        assert path.read_text() == between_marks(path.read_text(), text), STALE


def test_another_record_makes_other_pages(tmp_path: Path) -> None:
    for path in (README, PAGE):
        (tmp_path / path.name).write_text(path.read_text())
    changed = read_record(RECORD) | {
        "vipllava": FamilyFinding("A", "by row", "refused", "not verified", "yes", ("a | b",))
    }
    write_pages(changed, tmp_path / README.name, tmp_path / PAGE.name)
    expected = r"| vipllava | `A` | by row | refused | not verified | yes | a \| b |"
    assert expected in (tmp_path / PAGE.name).read_text() and expected not in PAGE.read_text()
    by_row = next(line for line in (tmp_path / README.name).read_text().splitlines() if "one sequence a row |" in line)
    assert " vipllava," in by_row and "vipllava" not in next(
        line for line in README.read_text().splitlines() if "one sequence a row |" in line
    )


def test_at_least_36_of_42_families_train_and_whatever_is_refused_says_why() -> None:
    record = read_record(RECORD)
    assert len(set(FORTY_TWO)) == 42
    served = [name for name in FORTY_TWO if record[name].training != "refused"]
    assert len(served) >= 36
    for name in served:
        assert record[name].encoder == "yes", name
        assert "refused" not in (record[name].patches, record[name].saliency), name
    # whose patches random weights mix
    mixed = [name for name in served if "not verified" in (record[name].patches, record[name].saliency)]
    assert mixed == ["fast_vlm"]
    for name, finding in record.items():
        refused = "refused" in (finding.training, finding.patches, finding.saliency, finding.encoder)
        assert not refused or finding.limits, name


@pytest.mark.slow
@pytest.mark.parametrize("name", all_names())
def test_a_family_is_what_the_record_says(name: str) -> None:
    if missing := zoo_findings.missing_packages(name):
        pytest.skip(f"needs {', '.join(missing)}")
    logging.disable(logging.WARNING)
    try:
        assert zoo_findings.finding_of(name) == read_record(RECORD)[name], STALE
    finally:
        logging.disable(logging.NOTSET)
