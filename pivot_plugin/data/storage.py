"""Pairs on disk and on the Hub: parquet files and a data card, which `datasets` and `load` read alike."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from PIL.Image import Image as PILImage

from pivot_plugin import __version__
from pivot_plugin.errors import DataError, PublishError, SettingsError, foreign_code
from pivot_plugin.files import whole_folder
from pivot_plugin.hub.repository import COMMIT_LIMIT_S, Hub, Publishing

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
REJECTED_IMAGES = "rejected_images"
SHARD_BYTES = 200_000_000
SHARD_ROWS = 20_000
CARD = "README.md"
TAG = "pivot"
NAMES = 'Give "owner/name".'
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
            features = _features(pairs)
            for number, rows in enumerate(_shards(pairs, features)):
                Dataset.from_list(rows, features=features).to_parquet(aside / "data" / f"train-{number:05d}.parquet")
            (aside / CARD).write_text(str(_card(pairs, report, built)), encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{str(target)!r} cannot be written: {error.strerror or error}.", "Choose another folder, or make room."
        ) from error
    return report


PAIRS = Publishing(
    noun="the data set",
    repo_type="dataset",
    # the tag of the card that `save` writes
    is_ours=lambda state: TAG in state.tags,
    goes=lambda name: name.startswith("data/") and name.endswith(".parquet"),
)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    *,
    exist_ok: bool = False,
) -> str:
    """Put saved pairs on the Hub in one commit: the card and the parquet files, whatever else lies in the folder.

    Safe to repeat: what is published already is recognised.

    Args:
        folder: written by `save`.
        repo_id: "owner/name" of the data set.
        private: of a repository that is created; the owner's default where None. One that exists and is public is
            refused with True.
        token: with write access; the one you are logged in with where None.
        exist_ok: put them into a repository that holds something else; what else it holds stays.

    Returns:
        address of the commit.

    Raises:
        DataError: if the folder holds no saved pairs, or links in their place.
        PublishError: if the Hub refuses or fails; its text says whether the repository is changed, or that this is not
            known.
    """
    source = Path(folder)
    remedy = "Write it with pivot_plugin.preferences.save."
    with foreign_code(f"{str(source)[:200]!r} cannot be read", remedy):
        shards = sorted(source.glob("data/*.parquet"))
        if not (source / CARD).is_file() or not shards:
            raise DataError(f"{str(source)!r} holds no saved pairs.", remedy)
    files = {CARD: source / CARD} | {f"data/{shard.name}": shard for shard in shards}
    for name, file in files.items():
        if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
            raise DataError(f"{name} in {str(source)!r} is a link, and not published.", "Put the file itself there.")
    hub = Hub(repo_id, "main", token, PAIRS)
    try:
        validate_repo_id(repo_id)
        if (before := hub.begin(private, exist_ok)) is None:
            raise PublishError(f"{repo_id} has no main branch.", "Make it, or choose another name.")
        if hub.is_this(before, files):
            return hub.url(before.commit)
        message = f"Preference pairs, written by pivot_plugin {__version__}"
        return hub.publish(files, before, message, create_pr=False, time_limit=COMMIT_LIMIT_S)[1]
    except (PublishError, HFValidationError) as error:
        finding, remedy = (error.finding, error.remedy) if isinstance(error, PublishError) else (error, NAMES)
        raise PublishError(f"The pairs could not be put on the Hub as {repo_id!r}: {finding}", remedy) from error


def _features(pairs: PairDataset) -> Features:
    """The columns of pairs; one with rejected images only where a row has some."""
    if not any(pairs.rejected_image_keys):
        return FEATURES
    return Features({**FEATURES, REJECTED_IMAGES: List(Image())})


def _shards(pairs: PairDataset, features: Features) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for position in range(len(pairs)):
        row = stored(pairs.plain(position), pairs.access, pairs.where(position))
        rows.append({name: row.get(name) for name in features})
        size += sum(len(image["bytes"]) for image in (*row["images"], *row.get(REJECTED_IMAGES, ())))
        if size > SHARD_BYTES or len(rows) >= SHARD_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def stored(pair: Mapping[str, Any], access: ImageAccess, where: str) -> dict[str, Any]:
    """A pair in the columns of `FEATURES`, and its rejected images where it has some, all as encoded bytes."""
    images = {
        name: [{"bytes": _bytes(access.encoded(source, where)), "path": None} for source in pair[name]]
        for name in ("images", REJECTED_IMAGES)
        if name in pair
    }
    messages = {
        name: [
            {"role": m["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]]}
            for m in pair[name]
        ]
        for name in ("prompt", "chosen", "rejected")
    }
    return {name: pair.get(name) for name in FEATURES} | images | messages


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
        tags=["preference", "dpo", "image-text", TAG],
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
