"""Whatever rows come in: opened, read late, and refused with a sentence where they cannot be."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pivot_plugin.errors import DataError, PivotError, SettingsError
from pivot_plugin.preferences import PairDataset, PairStream, load
from tests.helpers import picture

PAIRS = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}", "image": f"{n % 2}.png"} for n in range(4)]


def write(folder: Path, rows: list[dict[str, Any]] = PAIRS) -> Path:
    """A folder with a .jsonl file and its images."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(2):
        picture(20 + n, 10, n).save(folder / f"{n}.png")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table(folder: Path) -> datasets.Dataset:
    write(folder)
    rows = [pair | {"image": str(folder / str(pair["image"]))} for pair in PAIRS]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_json(folder: Path) -> Path:
    write(folder)
    (folder / "pairs.jsonl").unlink()
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    return folder / "pairs.json"


def as_wrapped_json(folder: Path) -> Path:
    path = as_json(folder)
    path.write_text(json.dumps({"version": 1, "data": PAIRS}))
    return path


def as_zip(folder: Path) -> Path:
    write(folder / "inner")
    with zipfile.ZipFile(folder / "pairs.zip", "w") as archive:
        for file in (folder / "inner").iterdir():
            archive.write(file, f"inner/{file.name}")
    return folder / "pairs.zip"


def as_parquet(folder: Path) -> Path:
    rows = table(folder)
    rows = rows.map(lambda row: row)  # so that image bytes are in the table
    (folder / "p" / "data").mkdir(parents=True)
    rows.select(range(2)).to_parquet(folder / "p" / "data" / "train-0.parquet")
    rows.select(range(2, 4)).to_parquet(folder / "p" / "data" / "train-1.parquet")
    return folder / "p"


def as_saved(folder: Path) -> Path:
    table(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_dict(folder: Path) -> Path:
    datasets.DatasetDict({"train": table(folder)}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_arrow(folder: Path) -> Path:
    return next(as_saved(folder).glob("*.arrow"))


def as_mmpr(folder: Path) -> Path:
    """MMPR v1.2's form: a meta file, an annotation folder, and an image folder per subset."""
    meta = {}
    for name in ("first", "second"):
        write(folder / "MMPR" / "images" / name)
        rows = [{**pair, "question": f"<image>\n{pair['prompt']}"} for pair in PAIRS]
        lines = [json.dumps({name: value for name, value in row.items() if name != "prompt"}) for row in rows[:2]]
        (folder / "MMPR" / "annotations").mkdir(exist_ok=True)
        (folder / "MMPR" / "annotations" / f"{name}.jsonl").write_text("\n".join(lines))
        meta[name] = {
            "root": f"MMPR/images/{name}",
            "annotation": f"MMPR/annotations/{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": 2,
        }
    (folder / "MMPR" / "meta.json").write_text(json.dumps(meta))
    return folder / "MMPR" / "meta.json"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": write,
    "jsonl": lambda folder: write(folder) / "pairs.jsonl",
    "json": as_json,
    "json with a list in it": as_wrapped_json,
    "zip": as_zip,
    "parquet folder": as_parquet,
    "parquet file": lambda folder: as_parquet(folder) / "data" / "train-0.parquet",
    "saved": as_saved,
    "saved dict": as_saved_dict,
    "arrow": as_arrow,
    "mmpr": as_mmpr,
    "Dataset": table,
    "DatasetDict": lambda folder: datasets.DatasetDict({"train": table(folder), "test": table(folder)}),
    "list": lambda folder: [pair | {"image": str(write(folder) / str(pair["image"]))} for pair in PAIRS],
    "tuple of PIL": lambda folder: tuple(pair | {"image": picture(20, 10, 0)} for pair in PAIRS),
    "IterableDataset": lambda folder: table(folder).to_iterable_dataset(),
    "generator": lambda folder: (row for row in table(folder)),
}


@pytest.mark.parametrize("form", SOURCES)
def test_every_source_gives_the_same_pairs(form: str, tmp_path: Path) -> None:
    pairs = list(iter_all(load(SOURCES[form](tmp_path))))
    assert len(pairs) == (2 if form == "parquet file" else 4)
    for number, pair in enumerate(pairs):
        expected = number % 2 if form == "mmpr" else number
        assert [part["type"] for part in pair["prompt"][0]["content"]][:1] == ["image"]
        assert f"{expected}?" in str(pair["prompt"])
        assert pair["rejected"][0]["content"] == [{"type": "text", "text": f"no {expected}"}]
        assert pair["images"][0].size == ((20, 10) if form == "tuple of PIL" else (20 + expected % 2, 10))


def iter_all(pairs: PairDataset | PairStream) -> Iterator[dict[str, Any]]:
    return iter(pairs) if isinstance(pairs, PairStream) else (pairs[i] for i in range(len(pairs)))


@pytest.mark.parametrize(
    "form", ["folder", "json", "zip", "parquet folder", "saved", "mmpr", "Dataset", "IterableDataset"]
)
def test_nothing_is_decoded_by_loading(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES[form](tmp_path)

    def decode(*args: object, **kwargs: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "open", decode)
    pairs = load(source)
    if isinstance(pairs, PairDataset):
        assert len([pairs.plain(i) for i in range(len(pairs))]) == 4


def test_the_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = table(tmp_path)
    both = datasets.DatasetDict({"first": rows, "second": rows.select(range(1))})
    with pytest.raises(DataError, match=r"has the splits first, second, and none was chosen. Choose one with split="):
        load(both)
    with pytest.raises(DataError, match="there is no 'third'"):
        load(both, split="third")
    second = load(both, split="second")
    assert isinstance(second, PairDataset)
    assert len(second) == 1
    with caplog.at_level("INFO"):
        load(datasets.DatasetDict({"train": rows, "test": rows}))
    assert "train is used" in caplog.text
    with pytest.raises(SettingsError, match="split='x' is given for a list"):
        load(PAIRS, split="x")


def test_a_generator_is_read_once_and_says_so() -> None:
    pairs = load(row for row in [{"prompt": "?", "chosen": "a", "rejected": "b"}])
    assert isinstance(pairs, PairStream)
    assert len(list(pairs)) == 1
    with pytest.raises(DataError, match="a generator that was read to its end"):
        list(pairs)


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt"])
def test_an_archive_whose_paths_leave_its_folder_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("pairs.jsonl", json.dumps({"prompt": "?", "chosen": "a", "rejected": "b"}))
        archive.writestr(name, "bad")
    with pytest.raises(DataError, match=r"bad.zip holds .*a path that leaves") as caught:
        load(tmp_path / "bad.zip")
    assert caught.value.kind == "path outside its folder"
    assert not list((tmp_path / "cache" / "archives").glob("*"))
    assert not list(tmp_path.rglob("out.txt"))


def test_rows_of_an_archive_do_not_read_files_outside_of_it(tmp_path: Path) -> None:
    picture(9, 9, 1).save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        row = {"prompt": "?", "chosen": "a", "rejected": "b", "image": str(tmp_path / "secret.png")}
        archive.writestr("pairs.jsonl", json.dumps(row))
    pairs = load(tmp_path / "bad.zip")
    assert isinstance(pairs, PairDataset)
    with pytest.raises(DataError, match=r"row 0 of bad.zip: .*lies outside"):
        pairs[0]


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    path = as_zip(tmp_path)
    load(path)
    unpacked = next((tmp_path / "cache" / "archives").iterdir())
    before = unpacked.stat().st_mtime_ns
    load(path)
    assert [entry.stat().st_mtime_ns for entry in (tmp_path / "cache" / "archives").iterdir()] == [before]


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("json", r"pairs.json is not JSON: line 1.*may have been cut"),
        ("zip", "cannot be unpacked"),
        ("parquet file", "cannot be read as parquet"),
        ("arrow", "cannot be read as arrow"),
    ],
)
def test_a_file_cut_in_the_middle_is_said(form: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load(cut(SOURCES[form](tmp_path)))


def test_a_jsonl_file_cut_in_the_middle_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path) / "pairs.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    pairs = load(path)
    assert isinstance(pairs, PairDataset)
    assert pairs[2]["rejected"]
    with pytest.raises(DataError, match=r"Line 4 of pairs.jsonl is not JSON.*may have been cut"):
        pairs[3]


def test_an_mmpr_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    meta = as_mmpr(tmp_path)
    (tmp_path / "MMPR" / "annotations" / "second.jsonl").unlink()
    with pytest.raises(DataError, match=r"the file 'MMPR/annotations/second.jsonl' of subset 'second'"):
        load(meta)


def test_a_folder_with_several_files_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"it holds: more.jsonl, pairs.jsonl"):
        load(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_said_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"no data set could be loaded from the Hub.*Check the name"):
        load("someone/no-such-pairs")


def test_a_type_that_changes_in_row_100000_is_named() -> None:
    good = {"prompt": "?", "chosen": "a", "rejected": "b"}
    rows: list[Any] = [good] * 100_000 + [{**good, "chosen": 7}] + [good] * 3
    with pytest.raises(DataError, match="row 100000 of prefs: chosen is int '7'"):
        load(rows, on_bad_row="raise").verify()  # type: ignore[union-attr]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "image", "bytes", "path", "score", "annotations"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
column = st.sampled_from(
    [
        "prompt",
        "question",
        "chosen",
        "rejected",
        "reject",
        "image",
        "images",
        "completions",
        "scores",
        "ranked",
        "text",
        "id",
        "source",
        "score_chosen",
        "x",
    ]
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": json_like}), max_size=3
)
row_like = st.dictionaries(column, json_like | messages | st.sampled_from(["a", "<image> b", ""]), max_size=8)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row_like | json_like, max_size=4), st.booleans())
def test_any_rows_give_pairs_or_a_pivot_error(rows: list[Any], as_stream: bool) -> None:
    try:
        pairs = load(iter(rows) if as_stream else rows)
        usable = list(pairs) if isinstance(pairs, PairStream) else list(iter_all(pairs.verify()))
    except PivotError as error:
        assert error.finding
        assert error.remedy
    else:
        assert all(pair["chosen"] and pair["rejected"] and pair["prompt"] for pair in usable)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.builds(
        json.dumps,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["annotation", "root", "prompt", "chosen", "rejected", "a"]), inner, max_size=4
                )
            ),
            max_leaves=8,
        ),
    ).map(str.encode),
    suffix=st.sampled_from([".json", ".jsonl", ".parquet", ".arrow", ".zip", ".txt"]),
)
def test_any_file_gives_pairs_or_a_pivot_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    try:
        pairs = load(path)
        list(iter_all(pairs))
    except PivotError as error:
        assert error.finding
        assert error.remedy


def outside(folder: Path) -> Path:
    """A saved data set of rows that nobody is meant to see."""
    secret = datasets.Dataset.from_list([{"prompt": "?", "chosen": "a secret", "rejected": "b"}])
    secret.save_to_disk(folder / "secret")
    (folder / "secret.jsonl").write_text(json.dumps({"prompt": "?", "chosen": "a secret", "rejected": "b"}))
    return folder


def bad_meta(archive: zipfile.ZipFile, secret: Path) -> None:
    archive.writestr("meta.json", json.dumps({"a": {"root": ".", "annotation": str(secret / "secret.jsonl")}}))


def bad_meta_above(archive: zipfile.ZipFile, secret: Path) -> None:
    above = "../" * 12 + str(secret / "secret.jsonl").lstrip("/")
    archive.writestr("meta.json", json.dumps({"a": {"root": ".", "annotation": above}}))


def bad_root(archive: zipfile.ZipFile, secret: Path) -> None:
    picture(9, 9, 1).save(secret / "secret.png")
    archive.writestr("meta.json", json.dumps({"a": {"root": str(secret), "annotation": "b/a.jsonl"}}))
    row = {"prompt": "?", "chosen": "a", "rejected": "b", "image": "secret.png"}
    archive.writestr("b/a.jsonl", json.dumps(row))


def bad_state(archive: zipfile.ZipFile, secret: Path) -> None:
    for file in (secret / "secret").iterdir():
        if file.suffix == ".json":
            archive.writestr(file.name, file.read_bytes())
    state = json.loads((secret / "secret" / "state.json").read_bytes())
    state["_data_files"] = [{"filename": str(secret / "secret" / state["_data_files"][0]["filename"])}]
    archive.writestr("state.json", json.dumps(state))


def bad_splits(archive: zipfile.ZipFile, secret: Path) -> None:
    archive.writestr("dataset_dict.json", json.dumps({"splits": [str(secret / "secret")]}))


def a_link(archive: zipfile.ZipFile, secret: Path) -> None:
    link = zipfile.ZipInfo("pairs.jsonl")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, str(secret / "secret.jsonl"))


@pytest.mark.parametrize("make", [bad_meta, bad_meta_above, bad_root, bad_state, bad_splits, a_link])
def test_an_archive_is_a_cage(make: Callable[[zipfile.ZipFile, Path], None], tmp_path: Path) -> None:
    secret = outside(tmp_path)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        make(archive, secret)
    with pytest.raises(DataError) as caught:
        list(iter_all(load(tmp_path / "bad.zip")))
    assert caught.value.kind == "path outside its folder" or "neither below" in caught.value.finding


def test_a_saved_data_set_has_its_files_in_its_own_folder(tmp_path: Path) -> None:
    secret = outside(tmp_path)
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(PAIRS).save_to_disk(saved)
    state = json.loads((saved / "state.json").read_bytes())
    state["_data_files"] = [{"filename": f"../secret/{next(secret.glob('secret/*.arrow')).name}"}]
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="which is no name of a file in it"):
        load(saved)


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pivot_plugin.data.sources.ALWAYS_UNPACKED", 1_000_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pairs.jsonl", b"0" * 20_000_000)
    with pytest.raises(DataError, match=r"bomb.zip has [\d,]+ bytes and unpacks to 20,000,000") as caught:
        load(tmp_path / "bomb.zip")
    assert caught.value.kind == "archive bomb"
    assert not list((tmp_path / "cache" / "archives").glob("*"))


def test_two_processes_may_unpack_one_archive(tmp_path: Path) -> None:
    path = as_zip(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: len(list(iter_all(load(path)))), range(8)))
    assert found == [4] * 8


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".zip"])
def test_a_pipe_is_no_file(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(tmp_path / f"pipe{suffix}")


@pytest.mark.parametrize("name", ["json", "parquet", "imagefolder", "csv", "text"])
def test_a_reader_of_datasets_is_no_name_of_a_data_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"'{name}' cannot be read: no such file or folder"):
        load(name)


def test_a_damaged_arrow_file_is_refused_and_takes_no_process_down(tmp_path: Path) -> None:
    """Offsets that point behind the end: unchecked, reading the strings between them ends the process."""
    datasets.Dataset.from_list(PAIRS * 50).save_to_disk(tmp_path / "saved")
    content = next((tmp_path / "saved").glob("*.arrow")).read_bytes()
    offsets = np.arange(3, 40, dtype=np.int32) * len("yes")
    at = content.index(offsets.tobytes())
    broken = content[:at] + np.full(37, 2**30, dtype=np.int32).tobytes() + content[at + 4 * 37 :]
    (tmp_path / "rows.arrow").write_bytes(broken)
    with pytest.raises(DataError, match=r"rows.arrow cannot be read as arrow: ArrowInvalid"):
        load(tmp_path / "rows.arrow")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "the key 'prompt' stands there twice"),
        ('{"prompt": ' + "1" * 5000 + "}", "ValueError"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_json_that_is_read_by_halves_elsewhere_is_refused(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(DataError, match=f"Line 1 of pairs.jsonl is not JSON: .*{said}"):
        list(iter_all(load(tmp_path / "pairs.jsonl")))
    (tmp_path / "pairs.json").write_text(f"[{line}]")
    with pytest.raises(DataError, match=r"pairs\.json is not JSON"):
        load(tmp_path / "pairs.json")


def test_a_stream_that_breaks_says_where() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"prompt": "a?", "chosen": "b", "rejected": "c"}
        raise OSError("the disk is gone")

    with pytest.raises(DataError, match="row 1 of prefs cannot be read: the disk is gone"):
        list(load(broken()))  # type: ignore[call-overload]


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_rows_are_left_out_up_to_a_bound(streamed: bool, tmp_path: Path) -> None:
    good, bad = {"prompt": "a?", "chosen": "b", "rejected": "c"}, {"prompt": "a?", "chosen": "b"}
    rows: list[Any] = [bad, good, good, *[good, bad] * 60]
    source = iter(rows) if streamed else rows
    kept = list(load(source, on_bad_row="skip", skipped=tmp_path / "skipped.jsonl"))  # type: ignore[call-overload]
    assert len(kept) == 62
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 61
    source = iter([good, *[bad] * 300]) if streamed else [good, *[bad] * 300]
    with pytest.raises(DataError, match=r"rows of prefs are bad, 5\d%.*more than 50% are not left out; the last"):
        list(load(source, on_bad_row="skip", skipped=tmp_path / "skipped.jsonl"))  # type: ignore[call-overload]
