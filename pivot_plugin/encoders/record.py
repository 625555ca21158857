"""pivot.json: where an encoder comes from, and a hash of every file that is read. It may come from strangers.

Read with limits (size, depth, kinds of values), and only names of files in the same folder are believed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pivot_plugin import __version__
from pivot_plugin.errors import EncoderError

from .contents import PROVENANCE, is_plain_file
from .plain import REMEDY, read_plain

# folders of users, and what lies in them
PLACES = re.compile(r"(?<![\w.:/])/(?:home|Users)/[^\s'\"]+|\b[A-Za-z]:\\+[^\s'\"]+", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".zip", ".tar", ".gz", ".yaml", ".txt")
PROJECTOR_FILE = "projector.safetensors"
FORMAT = 2
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class Origin:
    """Where a loaded encoder comes from.

    Attributes:
        folder: it was read from.
        repo: Hub id, None for a folder.
        revision: commit it was read at, None for a folder.
        record: its provenance, empty for an encoder that is not from this package.
    """

    folder: Path
    repo: str | None = None
    revision: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name for tables and records."""
        return self.repo or plain_name(self.folder)


def origin_of(encoder: object) -> Origin | None:
    """Where an encoder was loaded from, None for one that was not loaded by `load_encoder`."""
    found = getattr(encoder, "pivot_origin", None)
    return found if isinstance(found, Origin) else None


def read_provenance(folder: Path) -> dict[str, Any]:
    """The record in a folder, empty where there is none.

    Args:
        folder: of an encoder.

    Raises:
        EncoderError: if it is over-large, no JSON, too deep, or not of the form this package writes.
    """
    file = folder / PROVENANCE
    if not file.exists():
        return {}
    record = read_plain(file, "provenance record")
    if not isinstance(record.get("sha256", {}), dict):
        raise EncoderError(f"{str(file)!r} is no provenance record.", REMEDY)
    if not isinstance(record.get("format", FORMAT), int) or record.get("format", FORMAT) > FORMAT:
        raise EncoderError(
            f"{PROVENANCE} has format {record.get('format')!r}, this version of the package reads up to {FORMAT}.",
            "Update it: pip install -U pivot-plugin.",
        )
    for name, digest in record.get("sha256", {}).items():
        if not is_plain_file(name):
            raise EncoderError(
                f"{PROVENANCE} lists the file {name!r}, which is missing or no name in its folder.", REMEDY
            )
        if not isinstance(digest, str):
            raise EncoderError(f"{PROVENANCE} has no hash for {name!r}.", REMEDY)
    return record


def without_paths(value: Any) -> Any:
    """A record without paths of this machine: of each, its last part stays; in keys and within sentences too."""
    if isinstance(value, Mapping):
        return {_without_path(str(key)): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_paths(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        return _without_path(value)
    return value if isinstance(value, int | float | bool | None) else str(value)


def _without_path(text: str) -> str:
    if len(text) < 4096 and (text.startswith(("/", "~", "./", "../", "file:")) or ":\\" in text):
        return _last_part(text)
    for place in (str(Path.cwd()), str(Path.home())):
        if len(place) > 4:
            text = re.sub(rf"{re.escape(place)}(?:/[^\s'\"]*)?(?![\w-])", lambda found: _last_part(found[0]), text)
    return PLACES.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    parts = path.replace("\\", "/").rstrip("/").rsplit("/", maxsplit=2)
    # the folder of a user is called like the user
    return "" if len(parts) > 1 and parts[-2].lower() in ("home", "users") else parts[-1]


def plain_name(source: object) -> str:
    """A Hub id as it is, of a local path its last part, and nothing for what has no name."""
    text = str(source) if isinstance(source, str | Path) else ""
    path = Path(text)
    try:
        is_local = isinstance(source, Path) or path.exists()
    except (OSError, ValueError):
        is_local = False
    if is_local or not _HUB_ID.fullmatch(text) or path.suffix in DATA_SUFFIXES:
        return _last_part(text.partition("?")[0])
    return text


def versions() -> dict[str, str]:
    """Of this package and of the libraries that decide what it computes."""
    return {"pivot_plugin": __version__} | {name: version(name) for name in LIBRARIES}
