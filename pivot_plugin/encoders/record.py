"""pivot.json: where an encoder comes from, and a hash of every file that is read. It may come from strangers.

Read with limits (size, depth, kinds of values), and only names of files in the same folder are believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pivot_plugin import __version__
from pivot_plugin.errors import EncoderError

from .contents import RECORD as PROVENANCE
from .contents import is_plain_file
from .plain import REMEDY, read_plain

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
    """A record without paths of this machine: of each, its last part stays."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_paths(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str) and len(value) < 4096 and (value.startswith(("/", "~", "./", "../")) or ":\\" in value):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def plain_name(source: object) -> str:
    """A Hub id as it is, of a local path its last part, and nothing for what has no name."""
    text = str(source) if isinstance(source, str | Path) else ""
    path = Path(text)
    if not text or path.is_absolute() or text.startswith((".", "~")) or path.exists():
        return path.name
    return text


def versions() -> dict[str, str]:
    """Of this package and of the libraries that decide what it computes."""
    return {"pivot_plugin": __version__} | {name: version(name) for name in LIBRARIES}
