"""An encoder's folder onto the Hub: one commit, and the truth about it afterwards.

The weights go up first, which can be repeated and shows nothing yet; then one commit makes all of it visible. It names
the state that it was made from, so that of two who publish at once the second is refused, and never a mixture stands
there.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pivot_plugin import __version__
from pivot_plugin.errors import PublishError
from pivot_plugin.hub.repository import COMMIT_LIMIT_S, Hub, Publishing, State

from .contents import INDEX, PROVENANCE, is_plain_file
from .outgoing import Outgoing, outgoing

logger = logging.getLogger(__name__)

ENCODER = Publishing(
    noun="the encoder",
    repo_type="model",
    is_ours=lambda state: PROVENANCE in state.names,
    # in the folder itself: weights that people keep beside it in others stay
    goes=lambda name: name == INDEX or (is_plain_file(name) and name.endswith(".safetensors")),
)


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
        left_out: what else the folder holds, which is not published.
        card: text of the model card; for a dry run.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    files: dict[str, int]
    tag: str | None = None
    left_out: list[str] = field(default_factory=list)
    card: str = ""


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
        private: of a repository that is created; the owner's default where None. One that exists and is public is
            refused with True.
        revision: branch, made where it does not exist.
        tag: to set on the commit.
        token: that may write; the one you are logged in with where None.
        commit_message: first line; made of the encoder's class where None.
        create_pr: propose it as a pull request.
        exist_ok: put it into a repository that holds something else; what else it holds stays.
        dry_run: look at folder and name, send nothing, and return what would be sent, file by file, and the card.
        time_limit: seconds that the commit itself may take; the upload of weights before it has none.

    Raises:
        EncoderError: if the folder holds no whole encoder of ours.
        PublishError: if a file has a secret or a path of this machine in it, or the Hub refuses or fails; its text says
            whether the repository is changed, or that this is not known.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} cannot be a repository: {error}", 'Give "owner/name".') from error
    going = outgoing(Path(folder), token)
    if going.left_out:
        logger.info("Not published with the encoder: %s.", ", ".join(going.left_out))
    if dry_run:
        return Publication(repo_id, revision, "", "", going.sizes, tag, list(going.left_out), going.card)
    message = (
        commit_message
        or f"{going.record.get('encoder_class')} after preference optimisation (pivot_plugin {__version__})"
    )
    hub = Hub(repo_id, revision, token, ENCODER)
    before = _prepared(hub, private, exist_ok, tag, going)
    commit, url = _published(hub, going, before, message, create_pr, time_limit)
    published = Publication(repo_id, revision, commit, url, going.sizes, left_out=list(going.left_out))
    if tag is None:
        return published
    try:
        hub.tag(tag, commit, going.by_name)
    except PublishError as error:
        raise PublishError(f"The encoder is published at {commit[:12]}. {error.finding}", error.remedy) from error
    return replace(published, tag=tag)


def _prepared(hub: Hub, private: bool | None, exist_ok: bool, tag: str | None, going: Outgoing) -> State:
    """The state that the commit is to be made from, of a repository and a branch that may be written to."""
    state = hub.begin(private, exist_ok)
    if tag is not None and (on := hub.tagged(tag)) is not None and not hub.holds(going.by_name, on):
        raise PublishError(
            f"{hub.repo_id} has the tag {tag!r} already, on {on[:12]}, which is something else. Nothing was changed.",
            "Choose another tag.",
        )
    if state is None:
        hub.create_branch()
        if (state := hub.state(hub.revision)) is None:
            raise PublishError(
                f"The branch {hub.revision!r} of {hub.repo_id} was not made. No file there was changed.",
                "Run the same command again.",
            )
        if not exist_ok:
            hub.refuse_others(state)
    return state


def _published(
    hub: Hub, going: Outgoing, before: State, message: str, create_pr: bool, time_limit: float
) -> tuple[str, str]:
    """Commit and address of the publication: made now, or found to be there."""
    if create_pr:
        if (proposed := hub.pull_request(going.by_name, message)) is not None:
            logger.info("A pull request to %s with exactly these files is open already.", hub.repo_id)
            return proposed
    elif hub.is_this(before, going.by_name):
        logger.info("%s holds exactly these files already.", hub.repo_id)
        return before.commit, hub.url(before.commit)
    return hub.publish(going.by_name, before, message, create_pr, time_limit)
