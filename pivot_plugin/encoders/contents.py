"""What is read of an encoder's folder: regular files that stand in it, and the weights that its index names.

Libraries that load a folder read whatever they find in it, by names and links that its author chose. So every file that
could be read is looked at here first, and what leads elsewhere is refused.
"""

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pivot_plugin.errors import EncoderError, foreign_code
from pivot_plugin.files import sha256

from .plain import REMEDY, read_plain

PROVENANCE = "pivot.json"
CONFIG, PROCESSOR_CONFIG = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# of a PEFT model: what transformers would load the base of, whatever that is
OF_LORA = "adapter_config.json"
# suffixes of what is read; of everything else in a folder nothing is
READ = (".json", ".safetensors")
# weights in formats that run code when they are read, or say nothing of what they hold
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
MOST_FILES = 10_000


def read_files(folder: Path) -> list[str]:
    """Names of the files in a folder that loading it may read, in order.

    Args:
        folder: of an encoder.

    Raises:
        EncoderError: for one that is no file, or leads out of the folder.
    """
    names = []
    with foreign_code(f"Folder {str(folder)!r} cannot be read", "Give the folder of an encoder.", EncoderError):
        for number, entry in enumerate(folder.iterdir()):
            if number >= MOST_FILES:
                raise EncoderError(
                    f"{str(folder)!r} holds more than {MOST_FILES:,} entries.", "Give an encoder's folder."
                )
            if entry.suffix in READ:
                _refuse_special(folder, entry)
                names.append(entry.name)
    return sorted(names)


def _refuse_special(folder: Path, entry: Path) -> None:
    target = entry.resolve()
    inside = target.parent == folder.resolve()
    # what the Hub's client keeps: snapshots of links into the folder of contents beside them
    in_cache = target.parent.name == "blobs" and target.parent.parent == folder.resolve().parent.parent
    if entry.is_symlink() and not (inside or in_cache):
        raise EncoderError(
            f"{entry.name} in {str(folder)!r} is a link to {str(target)!r}, outside of the folder.",
            "Put the file itself there.",
        )
    if not entry.exists():
        raise EncoderError(f"{entry.name} in {str(folder)!r} is a link to nothing.", REMEDY)
    if not stat.S_ISREG(entry.stat().st_mode):
        raise EncoderError(f"{entry.name} in {str(folder)!r} is no file.", REMEDY)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that the weights of an encoder are in.

    Args:
        folder: of the encoder.

    Raises:
        EncoderError: if there are none, or the index names what is no file of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    listed = read_plain(folder / INDEX, "index of weights").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise EncoderError(f"{INDEX} in {str(folder)!r} lists no weights.", REMEDY)
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if not is_plain_file(name) or not name.endswith(".safetensors"):
            raise EncoderError(f"{INDEX} points at {name!r}, which is no weight file in its folder.", REMEDY)
        if not (folder / name).is_file():
            raise EncoderError(f"{name} is missing in {str(folder)!r}, and {INDEX} lists it.", REMEDY)
    return names


def held_numbers(folder: Path) -> int:
    """How many numbers the weight files of an encoder hold, by their headers.

    Args:
        folder: of the encoder.

    Raises:
        EncoderError: for a file that is cut off, or a header that makes no sense.
    """
    total = 0
    for name in weight_files(folder):
        with foreign_code(f"{name} in {str(folder)!r} is no whole safetensors file", REMEDY, EncoderError):
            header, _ = read_header(folder / name)
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    total += _numel(entry["shape"])
    return total


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin.

    Args:
        file: to read the beginning of.

    Raises:
        EncoderError: if the file is no safetensors file, or shorter than it says, as after half a download.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError("its header is cut off")
            header: dict[str, Any] = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EncoderError(f"{str(file)!r} is no whole safetensors file: {error}.", "Have it again.") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise EncoderError(
            f"{str(file)!r} is cut off: it has {size:,} bytes and says it has {expected:,}.",
            "Download or save it again.",
        )
    return header, 8 + length


def _numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"a tensor has the shape {shape!r}")
        product *= size
    return product


def check_hashes(folder: Path, record: Mapping[str, Any], digest_of: Callable[[Path], str] | None = None) -> list[str]:
    """Compare every file that is read with its recorded hash.

    Args:
        folder: of an encoder.
        record: its provenance.
        digest_of: SHA-256 of a file; computed anew where None.

    Returns:
        names of the files that were checked.

    Raises:
        EncoderError: naming a file that is missing, changed, or has no hash where others have.
    """
    expected, digest_of = record.get("sha256", {}), digest_of or sha256
    present = read_files(folder)
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            if name.endswith(READ):
                raise EncoderError(f"{name} is missing in {str(folder)!r}.", REMEDY)
            # pictures may be taken away again
            continue
        if (found := digest_of(file)) != digest:
            raise EncoderError(
                f"{name} in {str(folder)!r} has changed since it was saved: sha256 {found[:12]}..., the record says "
                f"{str(digest)[:12]}....",
                REMEDY,
            )
    if record:
        for name in present:
            # records of format 1 had hashes of weights alone
            if name not in (*expected, PROVENANCE) and (name.endswith(".safetensors") or record.get("format", 1) > 1):
                raise EncoderError(f"{name} in {str(folder)!r} has no hash in {PROVENANCE}.", REMEDY)
    return list(expected)


def is_plain_file(name: object) -> bool:
    """Whether something is the name of a file in a folder, and leads nowhere else."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", ".", "..")
        and "\\" not in name
        and "\0" not in name
        and len(name) < 256
    )
