"""Pairs on disk and on the Hub: parquet files and a data card, which `datasets` and `load` read alike."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL.Image import Image as PILImage

from pivot_plugin import __version__
from pivot_plugin.errors import DataError, SettingsError, foreign_code
from pivot_plugin.files import whole_folder

from .checking import CheckReport, check
from .images import ImageAccess
from .pairs import PairDataset

MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "source": Value("string"),
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
    }
)
SHARD_BYTES = 200_000_000
SHARD_ROWS = 20_000
CARD = "README.md"
CARD_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def save(pairs: PairDataset, folder: str | Path, built: str = "") -> CheckReport:
    """Write pairs as parquet files with a data card. Image files go in as they are, undecoded.

    Args:
        pairs: to save.
        folder: to write, as a whole or not at all; it may exist if it is empty or holds saved pairs.
        built: how the pairs came about, a sentence or two of markdown for the card.

    Returns:
        the report of the check that the card quotes.

    Raises:
        DataError: if a pair cannot be used.
        SettingsError: if the folder holds something else or cannot be written.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / "data").is_dir():
        raise SettingsError(f"{str(target)!r} holds something else.", "Choose an empty or new folder.")
    pairs.verify()
    report = check(pairs)
    try:
        with whole_folder(target) as aside:
            (aside / "data").mkdir()
            for number, rows in enumerate(_shards(pairs)):
                Dataset.from_list(rows, features=FEATURES).to_parquet(aside / "data" / f"train-{number:05d}.parquet")
            (aside / CARD).write_text(str(_card(pairs, report, built)), encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{str(target)!r} cannot be written: {error.strerror or error}.", "Choose another folder, or make room."
        ) from error
    return report


def push(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Put saved pairs on the Hub in one commit.

    Args:
        folder: written by `save`.
        repo_id: "owner/name" of the data set.
        private: of a repository that is created; the owner's default where None.
        token: with write access; the one you are logged in with where None.

    Returns:
        address of the commit.

    Raises:
        DataError: if the folder holds no saved pairs.
        SettingsError: if the Hub refuses.
    """
    source = Path(folder)
    remedy = "Write it with pivot_plugin.preferences.save."
    with foreign_code(f"{str(source)[:200]!r} cannot be read", remedy):
        if not (source / CARD).is_file() or not list(source.glob("data/*.parquet")):
            raise DataError(f"{str(source)!r} holds no saved pairs.", remedy)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        return str(
            api.upload_folder(
                folder_path=source,
                repo_id=repo_id,
                repo_type="dataset",
                commit_message=f"Preference pairs, written by pivot_plugin {__version__}",
                delete_patterns="data/*.parquet",
            ).commit_url
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SettingsError(
            f"The pairs could not be put on the Hub as {repo_id!r}: {error}",
            "Check the name and your login (`hf auth login`); nothing half-done is visible there, so try again.",
        ) from error


def _shards(pairs: PairDataset) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for position in range(len(pairs)):
        row = stored(pairs.plain(position), pairs.access, pairs.where(position))
        rows.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if size > SHARD_BYTES or len(rows) >= SHARD_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def stored(pair: Mapping[str, Any], access: ImageAccess, where: str) -> dict[str, Any]:
    """A pair in the columns of `FEATURES`, its images as encoded bytes."""
    images = [{"bytes": _bytes(access.encoded(source, where)), "path": None} for source in pair["images"]]
    messages = {
        name: [
            {"role": m["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]]}
            for m in pair[name]
        ]
        for name in ("prompt", "chosen", "rejected")
    }
    return {name: pair.get(name) for name in FEATURES} | {"images": images} | messages


def _bytes(encoded: bytes | PILImage) -> bytes:
    if isinstance(encoded, bytes):
        return encoded
    buffer = io.BytesIO()
    encoded.save(buffer, format="PNG")
    return buffer.getvalue()


def _card(pairs: PairDataset, report: CheckReport, built: str) -> DatasetCard:
    sources: dict[str, int] = {}
    for position in range(len(pairs)):
        name = pairs.plain(position).get("source", "unnamed")
        sources[name] = sources.get(name, 0) + 1
    data = DatasetCardData(
        tags=["preference", "dpo", "image-text", "pivot"],
        task_categories=["visual-question-answering"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    return DatasetCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        pairs=f"{len(pairs):,}",
        built=built,
        sources=[(name, f"{count:,}") for name, count in sorted(sources.items())],
        defects=report.defects,
        statistics=json.dumps(report.statistics, indent=2),
        version=__version__,
        datasets_version=datasets.__version__,
    )
