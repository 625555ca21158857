"""An encoder's folder onto the Hub: one commit, and the truth about it afterwards.

The weights go up first, which can be repeated and shows nothing yet; then one commit makes all of it visible.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pivot_plugin import __version__
from pivot_plugin.errors import EncoderError, PublishError

from .card import CARD
from .contents import PICKLES, check_hashes
from .hub import COMMIT_LIMIT_S, Hub
from .record import PROVENANCE, read_provenance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What was published.

    Attributes:
        repo_id: on the Hub.
        revision: branch it stands on.
        commit: id of the commit; empty for a dry run.
        url: of the commit, or of the pull request.
        files: sizes in bytes, by name.
        tag: set on the commit, if any.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    files: dict[str, int]
    tag: str | None = None


class PublishOptions(TypedDict, total=False):
    """The options of `publish`, for what hands them on."""

    private: bool | None
    revision: str
    tag: str | None
    token: str | None
    commit_message: str | None
    create_pr: bool
    exist_ok: bool
    dry_run: bool
    time_limit: float


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str = "main",
    tag: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    dry_run: bool = False,
    time_limit: float = COMMIT_LIMIT_S,
) -> Publication:
    """Put a saved encoder on the Hub in one commit; a reader sees the old state or the new one.

    Safe to repeat after a failure: weights that have arrived are not sent again, and what is published already is
    recognised.

    Args:
        folder: written by `PivotResult.save`.
        repo_id: "owner/name".
        private: of a repository that is created; the owner's default where None.
        revision: branch, made where it does not exist.
        tag: to set on the commit.
        token: that may write; the one you are logged in with where None.
        commit_message: first line; made of the encoder's class where None.
        create_pr: propose it as a pull request.
        exist_ok: put it into a repository that holds something else; what else it holds stays.
        dry_run: look at folder and name, send nothing, and return what would be sent.
        time_limit: seconds that the commit itself may take; the upload of weights before it has none.

    Raises:
        EncoderError: if the folder holds no whole encoder of ours.
        PublishError: if the Hub refuses or fails; its text says whether the repository is changed.
    """
    source = Path(folder)
    record = _whole(source)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} cannot be a repository: {error}", 'Give "owner/name".') from error
    files = sorted(path for path in source.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in files}
    if dry_run:
        return Publication(repo_id, revision, "", "", sizes, tag)
    hub = Hub(repo_id, revision, token)
    hub.prepare(private)
    stale = hub.stale_files(sizes, exist_ok)
    additions = [CommitOperationAdd(path.name, path) for path in files]
    message = (
        commit_message or f"{record.get('encoder_class')} after preference optimisation (pivot_plugin {__version__})"
    )
    if hub.holds(files) and not stale and not create_pr:
        logger.info("%s holds exactly these files already.", repo_id)
        head = hub.head()
        return _tagged(hub, Publication(repo_id, revision, head, hub.url(head), sizes), tag)
    hub.upload(additions, create_pr)
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    commit, url = hub.commit(operations, files, message, create_pr, time_limit)
    return _tagged(hub, Publication(repo_id, revision, commit, url, sizes), tag)


def _whole(folder: Path) -> dict[str, Any]:
    """The record of a folder that may be published."""
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
    if foreign := sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLES, ".py") or path.is_dir()):
        raise EncoderError(
            f"{str(folder)!r} also holds {', '.join(foreign)}, which is not published with an encoder.",
            "Move it elsewhere; weights are published as safetensors alone.",
        )
    try:
        ModelCard.load(folder / CARD)
    except ValueError as error:
        raise EncoderError(f"{CARD} is no model card: {error}", "Save the encoder again.") from error
    return record


def _tagged(hub: Hub, published: Publication, tag: str | None) -> Publication:
    if tag is None:
        return published
    try:
        hub.tag(tag, published.commit)
    except PublishError as error:
        raise PublishError(
            f"The encoder is published at {published.commit[:12]}, but its tag is not set: {error.finding}",
            error.remedy,
        ) from error
    return replace(published, tag=tag)
