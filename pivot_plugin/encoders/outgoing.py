"""What of an encoder's folder goes out: files of a list, none of them a link, without secrets or paths of this machine.

The record is written of listed things alone (`record.py`, `runs/provenance.py`); what is looked for here is what came
in by other doors: sections of plugins, names, folders that an earlier version wrote, edits by hand.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pivot_plugin.errors import EncoderError, PublishError, foreign_code
from pivot_plugin.hub.secrets import known_tokens

from .card import CARD, PICTURE
from .contents import PICKLES, PROVENANCE, check_hashes, is_plain_file, read_header
from .record import PLACES, read_provenance

# of the files that the record lists, by their ends
PUBLISHED = (".json", ".safetensors", ".png")
# metadata beside the tensors of a weight file; more than this is not looked through
_LARGEST_HEADER = 50_000_000
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
# of the Hub, GitHub, OpenAI and its like, Slack, AWS, Weights & Biases in an address, private keys, names in addresses
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bsk-[\w-]{20,}"
    r"|\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\b\w+://[^\s/@:]+:[^\s/@]+@"
)


@dataclass(frozen=True)
class Outgoing:
    """An encoder's folder as it is published.

    Attributes:
        files: that go out.
        left_out: names of what else the folder holds.
        record: provenance.
        card: text of the model card.
    """

    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    record: dict[str, Any]
    card: str

    @property
    def by_name(self) -> dict[str, Path]:
        """The files, by name."""
        return {path.name: path for path in self.files}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        return {path.name: path.stat().st_size for path in self.files}

    @property
    def shows_pictures(self) -> bool:
        """Whether pictures of the user's held-out rows go out."""
        return any(path.name == PICTURE for path in self.files)


def outgoing(folder: Path, token: str | None = None) -> Outgoing:
    """What of a folder may be published, and is.

    Args:
        folder: written by `PivotResult.save`.
        token: that was given to publish with, which must not be in any file.

    Raises:
        EncoderError: if it holds no whole encoder of ours, or a file of it is a link.
        PublishError: if a file says what should stay here.
    """
    if not folder.is_dir():
        raise EncoderError(f"{str(folder)!r} is no folder.", "Give the folder that PivotResult.save wrote.")
    record = read_provenance(folder)
    lora = record.get("weights") == "lora"
    needed = [CARD, *(["adapter_config.json"] if lora else ["config.json", "preprocessor_config.json"])]
    if not record.get("sha256") or (missing := [name for name in needed if not (folder / name).is_file()]):
        lacks = PROVENANCE if not record.get("sha256") else missing[0]
        raise EncoderError(
            f"{str(folder)!r} holds no encoder of ours: {lacks} is missing.", "Write it with PivotResult.save."
        )
    check_hashes(folder, record)
    listed = {name for name in record["sha256"] if is_plain_file(name) and name.endswith(PUBLISHED)}
    # an early record has hashes of weights alone
    listed |= {name for name in needed if (folder / name).is_file()} | {PROVENANCE}
    if foreign := sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLES, ".py") or path.is_dir()):
        raise EncoderError(
            f"{str(folder)!r} also holds {', '.join(foreign)}, which is not published with an encoder.",
            "Move it elsewhere; weights are published as safetensors alone.",
        )
    files = tuple(folder / name for name in sorted(listed) if os.path.lexists(folder / name))
    for path in files:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise EncoderError(
                f"{path.name} in {str(folder)!r} is a link, and what it leads to is not published.",
                "Put the file itself there.",
            )
    with foreign_code(f"{CARD} is no model card", "Save the encoder again.", EncoderError):
        card = str(ModelCard.load(folder / CARD))
    for path in files:
        _refuse_private(path, token)
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in listed))
    return Outgoing(files, left_out, record, card)


def _refuse_private(path: Path, token: str | None) -> None:
    """Refuse a file whose words have a secret, or a path of this machine, in them.

    Raises:
        PublishError: with the line; never with what stands there.
    """
    for number, line in enumerate(_words(path).splitlines(), start=1):
        if what := _private(line, token):
            raise PublishError(
                f"{path.name} has {what} in line {number}. Nothing was sent.",
                "Take it out where it comes from, such as a plugin's section or a name, and save the encoder again.",
            )


def _words(path: Path) -> str:
    if path.suffix == ".safetensors":
        with foreign_code(f"{path.name} is no whole safetensors file", "Save the encoder again.", EncoderError):
            return "\n".join(f"{name}: {value}" for name, value in read_header(path)[0].get("__metadata__", {}).items())
    if path.suffix == ".png":
        # its text chunks are readable as they are
        return path.read_bytes()[:_LARGEST_HEADER].decode("latin-1")
    return path.read_text(encoding="utf-8", errors="replace")


def _private(line: str, token: str | None) -> str | None:
    secrets = [*known_tokens(token), *(v for n, v in os.environ.items() if _SECRET_NAME.search(n))]
    if any(len(secret) >= 8 and secret in line for secret in secrets) or _SECRET.search(line):
        return "what looks like a token or a password"
    own = {str(Path.home()), str(Path.cwd())}
    if PLACES.search(line) or any(len(place) > 4 and re.search(rf"{re.escape(place)}(?![\w-])", line) for place in own):
        return "a path of this machine"
    return None
