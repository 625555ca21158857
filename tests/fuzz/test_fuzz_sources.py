"""Whatever a source holds, it ends as rows or as a PivotError: damaged files, odd values, damaged images."""

import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import strategies as st
from PIL import Image

from pivot_plugin.data.conversations import load_conversations
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.pairs import load
from pivot_plugin.data.questions import load_questions
from pivot_plugin.preferences import check
from tests.helpers import picture
from tests.helpers.fuzzing import ODD_VALUES, damaged, fuzz
from tests.helpers.images import encoded


class Encoded(bytes):
    """An image file that is short to read in a failing example."""

    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = Encoded(encoded(picture(20, 16, 1)))
ROWS = [
    {
        "id": str(n),
        "image": IMAGE,
        "question": f"how many {n}?",
        "chosen": f"it is {n}",
        "rejected": "no",
        "score_chosen": 1.0,
    }
    for n in range(4)
]
TURNS = [
    {
        "messages": [{"role": "user", "content": "<image>how many?"}, {"role": "assistant", "content": "two"}],
        "rejected_response": "three",
        "images": [IMAGE],
    }
]
FORMS = ("jsonl", "json", "parquet", "arrow", "zip", "saved", "mmpr")


@functools.cache
def files_of(form: str) -> dict[str, bytes]:
    """A source of a form, by names of its files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        named = [{**row, "image": f"{row['id']}.png"} for row in ROWS]
        lines = "\n".join(map(json.dumps, named)).encode()
        images = {f"{row['id']}.png": IMAGE for row in ROWS}
        table = Dataset.from_list(ROWS)
        if form == "jsonl":
            return {"rows.jsonl": lines, **images}
        if form == "json":
            return {"rows.json": json.dumps(named).encode(), **images}
        if form == "parquet":
            table.to_parquet(folder / "rows.parquet")
        elif form == "arrow":
            table.save_to_disk(folder / "saved")
            (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "rows.arrow")
            return {"rows.arrow": (folder / "rows.arrow").read_bytes()}
        elif form == "saved":
            table.save_to_disk(folder)
        elif form == "mmpr":
            meta = {"a": {"root": "images", "annotation": "a.jsonl"}}
            return {
                "meta.json": json.dumps(meta).encode(),
                "a.jsonl": lines,
                **{f"images/{n}": i for n, i in images.items()},
            }
        elif form == "zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in {"rows.jsonl": lines, **images}.items():
                    archive.writestr(name, content)
            return {"rows.zip": buffer.getvalue()}
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@st.composite
def broken_sources(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Form, name and content of the file of a source that is damaged."""
    form = draw(st.sampled_from(FORMS))
    files = files_of(form)
    name = draw(st.sampled_from(sorted(files)))
    return form, name, draw(damaged(files[name]))


def read_all(source: object) -> None:
    """Read every row of a source with its images."""
    pairs = load(source)
    for _ in zip(range(10), pairs, strict=False):
        pass
    check(source)


def test_damaged_files() -> None:
    def look(case: tuple[str, str, bytes]) -> None:
        form, damaged_name, content = case
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            files = files_of(form) | {damaged_name: content}
            for name, whole in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(whole)
            main = next((folder / name for name in files if Path(name).stem in ("rows", "meta")), folder)
            read_all(main)

    fuzz("damaged files", broken_sources(), look)


@st.composite
def odd_rows(draw: st.DrawFn, of: list[list[dict[str, Any]]] | None = None) -> list[dict[str, Any]]:
    """Rows with something else in some places."""
    rows = [dict(row) for row in draw(st.sampled_from(of or [ROWS, TURNS]))]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        names = [*row, "prompt", "images", "image", "conversations", "score_rejected", "source", "history", "system"]
        name = draw(st.sampled_from(names))
        match draw(st.sampled_from(["set", "set", "drop", "array"])):
            case "set":
                row[name] = draw(st.sampled_from(ODD_VALUES))
            case "drop":
                row.pop(name, None)
            case "array":
                row[name] = np.array(draw(st.sampled_from([[1, 2], ["a"], [[1.5]], []])))
    return rows


@pytest.mark.parametrize("read", [load, load_questions, load_conversations])
def test_odd_rows(read: Callable[[object], Any]) -> None:
    def look(rows: list[dict[str, Any]]) -> None:
        opened = read(rows)
        for position in range(len(opened)):
            opened[position]
        opened.verify().fingerprint()

    fuzz(f"odd rows, {read.__name__}", odd_rows(), look)


def test_odd_rows_that_are_skipped() -> None:
    """Left out whatever is wrong, in lists and in streams, up to the bound."""

    def look(case: tuple[list[dict[str, Any]], bool]) -> None:
        rows, streamed = case
        good = [{**row, "id": f"good {n}"} for n, row in enumerate(ROWS * 2)]
        with tempfile.TemporaryDirectory() as place:
            listed = Path(place) / "skipped.jsonl"
            source = [*rows, *good]
            kept = list(load(iter(source) if streamed else source, on_bad_row="skip", skipped=listed))
            skipped = [json.loads(line)["row"] for line in listed.read_text().splitlines()] if listed.exists() else []
            assert [pair["id"] for pair in kept][-8:] == [row["id"] for row in good]
            assert len(kept) + len(skipped) == len(source)

    fuzz("odd rows, skipped", st.tuples(odd_rows([ROWS]), st.booleans()), look)


@functools.cache
def image_files() -> list[bytes]:
    image, grey = picture(40, 30, 1), np.linspace(0, 65535, 1200).reshape(30, 40)
    forms = {"PNG": {}, "JPEG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "PPM": {}, "JPEG2000": {}}
    made = [encoded(image, form, **options) for form, options in forms.items()]
    made += [encoded(image, "TIFF", compression=kind) for kind in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate")]
    made.append(encoded(Image.fromarray(grey.astype(np.uint16))))
    made.append(encoded(Image.fromarray((grey / 65535).astype(np.float32)), "TIFF"))
    made += [encoded(image, form) for form in ("DDS", "ICO", "TGA", "PCX", "SGI")]
    return made


def test_damaged_images() -> None:
    def look(content: bytes) -> None:
        access = ImageAccess(max_pixels=1_000_000)
        key = access.key(content, "row 0")
        image = access.open(content, "row 0")
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000
        assert access.size(content, "row 0") == image.size
        assert access.key(image, "row 0") == key

    cases = st.integers(0, len(image_files()) - 1).flatmap(lambda number: damaged(image_files()[number]))
    fuzz("damaged images", cases, look, cheap=300)
