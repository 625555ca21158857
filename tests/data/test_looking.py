"""One look at every row: in shares that find the same alike, and remembered by content."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pivot_plugin.data import looking
from pivot_plugin.data.images import ImageAccess
from pivot_plugin.data.launch import Launch
from pivot_plugin.data.pairs import PairDataset, load_pairs
from pivot_plugin.errors import DataError
from tests.helpers import picture, row

ROWS = 40


@dataclass(frozen=True)
class Together(Launch):
    """Launch of a test, which are threads."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    table: dict[int, Any] = field(default_factory=dict)

    def gather(self, mine: Any) -> list[Any]:
        self.table[self.rank] = mine
        self.meeting.wait(timeout=60)
        everyones = [self.table[rank] for rank in range(self.count)]
        self.meeting.wait(timeout=60)
        return everyones


def in_processes(count: int, work: Callable[[Launch], Any]) -> list[Any]:
    meeting, table, results = threading.Barrier(count), {}, [None] * count

    def one(rank: int) -> None:
        try:
            results[rank] = work(Together(rank, count, rank, count, meeting, table))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "ROWS_PER_BLOCK", 4)
    monkeypatch.setattr(looking, "BLOCKS_PER_ROUND", 4)
    # few rows are remembered, too, and looked at by no further processes
    monkeypatch.setattr("pivot_plugin.data.rows.WORTH_PROCESSES", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for number in range(10):
        picture(40, 30 + number, number).save(tmp_path / f"{number}.png")
    lines = [
        {"image": f"{n % 10}.png", "prompt": f"number {n}?", "chosen": "yes" * (n + 1), "rejected": "no"}
        for n in range(ROWS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "pairs.jsonl"


class Counting:
    """Counts the images that are looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = ImageAccess.known

        def counted(access: ImageAccess, source: object, where: str = "image") -> Any:
            self.count += 1
            return original(access, source, where)

        monkeypatch.setattr(ImageAccess, "known", counted)

    def of(self, source: object) -> tuple[int, PairDataset]:
        before = self.count
        pairs = load_pairs(source).verify()
        return self.count - before, pairs


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def change(file: Path, number: int, **values: object) -> None:
    lines = file.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    file.write_text("\n".join(lines) + "\n")


def test_a_second_look_at_the_same_rows_takes_what_the_first_has_found(file: Path, counting: Counting) -> None:
    looked, first = counting.of(file)
    again, second = counting.of(file)
    assert (looked, again) == (ROWS, 0)
    for name, values in vars(first.looks).items():
        assert (getattr(second.looks, name) == values).all(), name
        # these rows have no rejected images, and none that is edited
        assert values.any() or name in ("rejected_keys", "origins"), name
    assert second.fingerprint() == first.fingerprint()
    assert second[5]["image_key"] == first[5]["image_key"]


def test_only_blocks_of_changed_rows_and_of_changed_pictures_are_looked_at_again(
    file: Path, counting: Counting
) -> None:
    _, before = counting.of(file)
    change(file, 9, chosen="perhaps")
    looked, after = counting.of(file)
    assert looked == 4
    assert after.content_key(9) != before.content_key(9) and after.content_key(8) == before.content_key(8)
    picture(50, 60, 99).save(file.with_name("3.png"))
    # rows 3, 13, 23, 33, each in a block of its own
    looked, repainted = counting.of(file)
    assert looked == 16
    assert repainted.image_keys[13] != after.image_keys[13] and repainted.image_keys[12] == after.image_keys[12]


def test_a_picture_that_comes_before_another_in_the_folders_is_looked_at(
    file: Path, tmp_path: Path, counting: Counting
) -> None:
    (tmp_path / "others").mkdir()
    first = load_pairs(file, image_folder=tmp_path / "others").verify()
    assert counting.count == ROWS
    picture(50, 60, 99).save(tmp_path / "others" / "3.png")
    second = load_pairs(file, image_folder=tmp_path / "others").verify()
    assert counting.count == ROWS + 16
    assert second.image_keys[3] != first.image_keys[3]


def test_bad_rows_are_remembered_with_what_is_wrong_until_they_are_mended(
    file: Path, tmp_path: Path, counting: Counting
) -> None:
    file.with_name("7.png").unlink()
    kept = [load_pairs(file).verify("skip", tmp_path / f"{number}.jsonl") for number in range(2)]
    assert counting.count == ROWS and len(kept[0]) == len(kept[1]) == ROWS - 4
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text() != ""
    with pytest.raises(DataError, match=r"row 7 of .*7\.png"):
        load_pairs(file).verify()
    picture(40, 37, 7).save(file.with_name("7.png"))
    assert len(load_pairs(file).verify()) == ROWS


def test_what_a_plugin_s_layout_gives_is_forgotten_when_the_rows_are_read_otherwise(
    file: Path, counting: Counting
) -> None:
    counting.of(file)
    renamed = load_pairs(file, columns={"chosen": "rejected", "rejected": "chosen"}).verify()
    assert counting.count == 2 * ROWS
    assert renamed.content_key(1) != load_pairs(file).content_key(1)


def test_decoded_images_are_looked_at_every_time(counting: Counting) -> None:
    rows = [row(f"number {n}?", "yes", "no", picture(40, 40, n)) for n in range(8)]
    assert [counting.of(rows)[0] for _ in range(2)] == [8, 8]
    rows_of_files = [{**one, "images": [b"no image"]} for one in rows]
    with pytest.raises(DataError, match="row 0"):
        counting.of(rows_of_files)


def test_a_damaged_memory_and_a_full_disk_cost_a_second_look(
    file: Path, tmp_path: Path, counting: Counting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting.of(file)
    for part in (tmp_path / "cache" / "checked").rglob("*.parquet"):
        part.write_bytes(part.read_bytes()[:100])

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pivot_plugin.data.remembered.write_whole", refuse)
    assert counting.of(file)[0] == ROWS
    assert "is left out" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize("count", [2, 3, 20])
def test_processes_look_at_a_share_each_and_find_what_one_finds(
    file: Path, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.with_name("7.png").unlink()
    looked: list[str] = []
    original = PairDataset.plain
    monkeypatch.setattr(PairDataset, "plain", lambda pairs, n: (looked.append(pairs.where(n)), original(pairs, n))[1])
    alone = load_pairs(file).verify("skip", tmp_path / "alone.jsonl")
    monkeypatch.setenv("PIVOT_CACHE", str(tmp_path / "another"))
    looked.clear()

    def look(launch: Launch) -> PairDataset:
        pairs = load_pairs(file)
        return pairs.verify("skip", tmp_path / f"skipped-{launch.rank}.jsonl", launch=launch)

    for pairs in in_processes(count, look):
        assert (pairs.looks.contents == alone.looks.contents).all() and pairs.fingerprint() == alone.fingerprint()
    # none twice
    assert sorted(looked) == sorted(set(looked)) and len(looked) == ROWS
    assert (tmp_path / "skipped-0.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
    assert not list(tmp_path.glob("skipped-[1-9]*.jsonl"))


def test_all_processes_stop_at_the_same_bad_row(file: Path) -> None:
    change(file, 30, image="nowhere.png")
    change(file, 5, image="gone.png")
    errors = in_processes(3, lambda launch: load_pairs(file).verify(launch=launch))
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], DataError) and "row 5" in str(errors[0]) and "gone.png" in str(errors[0])


def test_processes_with_different_data_are_told_so(file: Path) -> None:
    def look(launch: Launch) -> PairDataset:
        rows = [row(f"number {n}?", "yes", "no") for n in range(4 + launch.rank)]
        return load_pairs(rows).verify(launch=launch)

    errors = in_processes(2, look)
    assert all(isinstance(error, DataError) and "4, 5 rows in the processes" in str(error) for error in errors)
