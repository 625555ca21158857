"""Encoders from the Hub onto this machine: in bounded time, tried once more, and what came down broken is thrown away.

The Hub's client checks a file for its size alone, retries no body that breaks off, and waits for an answer as long as
it takes. Its cache names every content by its hash, so that what lies there broken, from whenever, is known without
asking anybody, and is had again.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from pivot_plugin.deadline import Overdue, within
from pivot_plugin.errors import EncoderError
from pivot_plugin.files import is_full, sha256, unwritten
from pivot_plugin.hub.secrets import HTTP_ERROR, hidden, status_of

from .contents import PICKLES

logger = logging.getLogger(__name__)

T = TypeVar("T")
DOWNLOADED = ("*.json", "*.safetensors", "README.md", "*.png")
CODE = ("*.py", *(f"*{suffix}" for suffix in PICKLES))
# seconds for an answer of the Hub, and for a download in which nothing moves
ANSWER_LIMIT_S = 30.0
STALL_LIMIT_S = 60.0
# what another attempt may mend
PASSING = (408, 425, 429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
REMEDY = "Check the path or the id, the revision, and whether the repository needs a token."
AGAIN = "Run the same command again: what is complete is not had again."


@dataclass(frozen=True)
class Download:
    """How the files of an encoder are had.

    Attributes:
        revision, trust_remote_code, token, cache_dir, local_files_only: as for `load_encoder`.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @property
    def cache(self) -> Path:
        """Folder of the Hub's client that downloads lie in."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()


def downloaded(repo: str, download: Download) -> tuple[Path, str | None, list[str]]:
    """The files of a repository.

    Args:
        repo: Hub id.
        download: how they are had.

    Returns:
        their folder, its commit, and the names of all files that the repository has there.

    Raises:
        EncoderError: if they cannot be had, do not come in time, or come down broken.
    """
    local_files_only = download.local_files_only
    names: list[str] = []
    try:
        if not local_files_only:
            names = answered(lambda: _names(repo, download.revision, download))
    except (OfflineModeIsEnabled, ConnectionError) as error:
        logger.info("%s is looked for in the cache alone: %s", repo, hidden(error, download.token))
        local_files_only = True
    except EncoderError:
        raise
    # the client raises its own errors, those of its HTTP library, and those of the disk; none of them is of ours
    except Exception as error:
        if not (_may_pass(error) or isinstance(error, Overdue)) or not _is_cached(repo, download):
            raise _not_had(repo, error, download) from error
        logger.warning("%s is read from the cache: %s", repo, hidden(error, download.token))
        local_files_only = True
    try:
        folder = _had(repo, download, local_files_only)
        if broken := _broken(folder):
            folder = _had_again(repo, download, local_files_only, broken)
        if not local_files_only and _COMMIT.fullmatch(folder.name):
            # of the commit that came down, should the branch have moved meanwhile
            names = answered(lambda: _names(repo, folder.name, download))
    except EncoderError:
        raise
    except Exception as error:
        raise _not_had(repo, error, download) from error
    commit = folder.name if _COMMIT.fullmatch(folder.name) else download.revision
    return folder, commit, names or [str(file.relative_to(folder)) for file in folder.rglob("*")]


def _not_had(repo: str, error: Exception, download: Download) -> EncoderError:
    if is_full(error):
        full = unwritten(download.cache, error)
        return EncoderError(
            f"{repo!r} could not be had: {full.finding}",
            f"{full.remedy.partition(',')[0]}, or give another cache_dir=; what has come down is kept.",
        )
    if isinstance(error, Overdue):
        return EncoderError(f"{repo!r} could not be had: {hidden(error, download.token)}.", AGAIN)
    status = status_of(error)
    passing = status in PASSING or (status is None and isinstance(error, HTTP_ERROR))
    return EncoderError(
        f"{repo!r} is no folder, and no such repository could be had: {hidden(error, download.token)}",
        AGAIN if passing else REMEDY,
    )


def _names(repo: str, revision: str | None, download: Download) -> list[str]:
    """Names of all files of a repository."""
    info = HfApi(token=download.token).model_info(repo, revision=revision, timeout=ANSWER_LIMIT_S)
    present = [str(file.rfilename) for file in info.siblings or []]
    for name in present:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise EncoderError(
                f"{repo} has a file named {name!r}, which leads out of its folder.", "Do not use this repository."
            )
    return present


def _is_cached(repo: str, download: Download) -> bool:
    try:
        _had(repo, download, local_files_only=True)
    except (HTTP_ERROR, LocalEntryNotFoundError, OSError, ValueError):
        return False
    return True


def answered(ask: Callable[[], T]) -> T:
    """An answer of the Hub, asked for once more where it broke off or may come later.

    Args:
        ask: the question; one that changes nothing.

    Raises:
        Overdue: if it does not come in time; else what the Hub's client raises.
    """
    try:
        return within(ANSWER_LIMIT_S, ask)
    except OfflineModeIsEnabled:
        raise
    except (HTTP_ERROR, OSError) as error:
        if not _may_pass(error):
            raise
        time.sleep(1.0)
        return within(ANSWER_LIMIT_S, ask)


def _may_pass(error: Exception) -> bool:
    status = status_of(error)
    return status in PASSING or (status is None and isinstance(error, HTTP_ERROR) and not isinstance(error, Overdue))


def _had(repo: str, download: Download, local_files_only: bool) -> Path:
    """The folder of a repository's files in the cache, downloaded where they are not there yet."""
    patterns = [*DOWNLOADED, *(CODE if download.trust_remote_code else ())]

    def have() -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=download.revision,
                token=download.token,
                cache_dir=download.cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    if local_files_only:
        return have()
    kept = download.cache / f"models--{repo.replace('/', '--')}"
    try:
        return _while_it_moves(have, kept)
    except (HTTP_ERROR, OSError) as error:
        if isinstance(error, Overdue) or status_of(error) not in (*PASSING, None):
            raise
        logger.warning("The download of %s broke off and is tried again: %s", repo, hidden(error, download.token))
        return _while_it_moves(have, kept)


def _while_it_moves(have: Callable[[], T], folder: Path) -> T:
    """What a download gives, if it does not stand still.

    Raises:
        Overdue: if nothing has come for a while; the download goes on by itself, and keeps what it has.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(have())
        # handed over to the caller's thread, whatever it is
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    size, since = _size(folder), time.monotonic()
    while thread.is_alive():
        thread.join(0.05 if time.monotonic() - since < 1 else 1.0)
        if (now := _size(folder)) != size:
            size, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > STALL_LIMIT_S:
            raise Overdue(f"nothing has come down for {STALL_LIMIT_S:.0f} s")
    if failure:
        raise failure[0]
    return answer[0]


def _size(folder: Path) -> int:
    """Bytes in the contents of a cache, those of unfinished downloads included."""
    total = 0
    try:
        for entry in os.scandir(folder / "blobs"):
            total += entry.stat().st_size
    except OSError:
        # not there yet, or a file was just renamed
        pass
    return total


def _broken(folder: Path) -> list[Path]:
    """Files of a snapshot whose content is not the one that the cache has them under.

    Args:
        folder: of a snapshot; in a cache without links nothing can be told.
    """
    broken = []
    for entry in folder.rglob("*"):
        if not entry.is_symlink():
            continue
        blob = entry.resolve()
        if not blob.is_file() or not _is_named_by_content(blob):
            broken.append(entry)
    return broken


def _is_named_by_content(blob: Path) -> bool:
    if _SHA256.fullmatch(blob.name):
        return sha256(blob) == blob.name
    if _COMMIT.fullmatch(blob.name):
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file that was downloaded; the name of its content, which it was compared with, where that is it."""
    blob = path.resolve()
    return blob.name if path.is_symlink() and _SHA256.fullmatch(blob.name) else sha256(path)


def _had_again(repo: str, download: Download, local_files_only: bool, broken: list[Path]) -> Path:
    """The folder of a repository's files after those that are broken were thrown away and had again.

    Raises:
        EncoderError: if they may not be had again, or come down broken once more.
    """
    names = ", ".join(sorted(entry.name for entry in broken))
    if local_files_only:
        raise EncoderError(
            f"{names} of {repo!r} lies broken in the cache.",
            "Load it once while the Hub can be asked: it mends itself.",
        )
    logger.warning("%s of %s came down broken and is had again.", names, repo)
    _throw_away(broken)
    folder = _had(repo, download, local_files_only)
    if still := _broken(folder):
        _throw_away(still)
        names = ", ".join(sorted(entry.name for entry in still))
        raise EncoderError(
            f"{names} of {repo!r} came down broken twice: not the content that the Hub says it has.",
            "Try again later, or over another network.",
        )
    return folder


def _throw_away(broken: list[Path]) -> None:
    for entry in broken:
        entry.resolve().unlink(missing_ok=True)
        entry.unlink(missing_ok=True)
