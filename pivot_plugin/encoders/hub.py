"""A repository on the Hub, written to so that what stands there is known afterwards.

The Hub's client does not retry a commit, sets it no time limit, and raises when only the answer was lost. So a commit
has a time limit of its own here, and after any failure the repository is read again before anything is said about it.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from pivot_plugin import __version__
from pivot_plugin.deadline import within
from pivot_plugin.errors import PublishError

from .contents import is_plain_file, sha256
from .record import PROVENANCE
from .secrets import HTTP_ERROR, hidden, status_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
COMMIT_LIMIT_S = 180.0
ATTEMPTS = 4
LONGEST_WAIT_S = 60.0
RETRIED = (408, 425, 429, 500, 502, 503, 504)
# what a repository may hold from its creation
NEW_REPO_FILES = (".gitattributes", "README.md")
WITHOUT_XET = "A Hub without a Xet store? Set HF_HUB_DISABLE_XET=1 and run the same command again."
LOGIN = "Log in with a token that may write (hf auth login), or pass token=."


class Hub:
    """One branch of one repository, and what can be known of it.

    Every method raises PublishError where the Hub refuses or fails, and says whether something is changed there.

    Args:
        repo_id: "owner/name".
        revision: the branch.
        token: that may write; the one you are logged in with where None.
    """

    def __init__(self, repo_id: str, revision: str, token: str | None) -> None:
        self.api = HfApi(token=token, library_name="pivot_plugin", library_version=__version__)
        self.repo_id, self.revision, self.token = repo_id, revision, token

    def prepare(self, private: bool | None) -> None:
        """Make sure of repository and branch."""
        self.asked("create the repository", lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        if self.revision != "main":
            self.asked(
                f"create the branch {self.revision!r}",
                lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True),
            )

    def head(self) -> str:
        """The commit the branch stands at."""
        info = self.asked("read the repository", lambda: self.api.model_info(self.repo_id, revision=self.revision))
        return str(info.sha)

    def stale_files(self, new: dict[str, int], exist_ok: bool) -> list[str]:
        """Files of an earlier publication of ours that are not part of this one.

        Raises:
            PublishError: if the repository holds something else and that was not allowed.
        """
        info = self.asked("read the repository", lambda: self.api.model_info(self.repo_id, revision=self.revision))
        present = {str(file.rfilename) for file in info.siblings or []}
        if PROVENANCE not in present:
            if (others := sorted(present - set(NEW_REPO_FILES))) and not exist_ok:
                raise PublishError(
                    f"{self.repo_id} holds something else already: {', '.join(others[:5])}. Nothing was changed.",
                    "Choose another name, or pass exist_ok=True (--exist-ok): its other files stay.",
                )
            return []
        ours = [name for name in present if is_plain_file(name) and name.endswith(".safetensors")]
        return sorted(name for name in [*ours, "model.safetensors.index.json"] if name in present and name not in new)

    def holds(self, files: Sequence[Path]) -> bool:
        """Whether the branch holds files with exactly these contents."""
        names = [path.name for path in files]
        present = self.asked(
            "read the files",
            lambda: {
                str(entry.path): entry for entry in self.api.get_paths_info(self.repo_id, names, revision=self.revision)
            },
        )
        return all(path.name in present and _same(path, present[path.name]) for path in files)

    def url(self, commit: str) -> str:
        """The address of a commit."""
        return f"{self.api.endpoint}/{self.repo_id}/commit/{commit}"

    def upload(self, additions: Sequence[CommitOperationAdd], create_pr: bool) -> None:
        """Send the weights; nothing of them can be seen before the commit."""
        self.asked(
            "upload the weights",
            lambda: self.api.preupload_lfs_files(
                self.repo_id,
                additions,
                revision=self.revision,
                create_pr=create_pr or None,
                # the commit's own upload step must find them sent
                free_memory=False,
            ),
        )

    def commit(
        self, operations: Sequence[Any], files: Sequence[Path], message: str, create_pr: bool, time_limit: float
    ) -> tuple[str, str]:
        """Make the commit; after a failure find out what became of it.

        Args:
            operations: additions, sent already, and deletions.
            files: that are added; by them a commit whose answer was lost is recognised.
            message: first line of the commit.
            create_pr: propose it as a pull request.
            time_limit: seconds that the commit may take.

        Returns:
            its id and its address, or that of the pull request.
        """
        before = self.head()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                made: CommitInfo = within(
                    time_limit,
                    lambda: self.api.create_commit(
                        self.repo_id,
                        operations,
                        commit_message=message,
                        revision=self.revision,
                        parent_commit=None if create_pr else before,
                        create_pr=create_pr or None,
                    ),
                )
                return str(made.oid), str(made.pr_url or made.commit_url)
            except (HTTP_ERROR, OSError, TimeoutError, RuntimeError) as error:
                wait = self._after_failure(error, before, files, create_pr, attempt)
                if wait is None:
                    head = self.head()
                    logger.warning(
                        "The answer to the commit was lost, but %s holds all files at %s.", self.repo_id, head
                    )
                    return head, self.url(head)
                logger.warning("The commit failed (%s) and is tried again in %.0f s.", hidden(error, self.token), wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _after_failure(
        self, error: Exception, before: str, files: Sequence[Path], create_pr: bool, attempt: int
    ) -> float | None:
        """None where the commit has landed all the same, else how long to wait before another attempt.

        Raises:
            PublishError: if another attempt would not help, saying whether the repository is changed.
        """
        why = hidden(error, self.token)
        if create_pr:
            raise PublishError(
                f"The pull request to {self.repo_id} failed: {why} The branch {self.revision!r} is unchanged.",
                "Look at the repository's pull requests, and try again.",
            ) from error
        try:
            head = self.head()
            landed = head != before and self.holds(files)
        except PublishError as unread:
            raise PublishError(
                f"The commit to {self.repo_id} failed: {why} Whether it has landed could not be read: {unread.finding}",
                "Run the same command again later: what is published is recognised.",
            ) from error
        if landed:
            return None
        if head != before:
            raise PublishError(
                f"{self.repo_id} changed while the encoder was published: it is at {head[:12]}, was at {before[:12]}. "
                "The encoder is not published.",
                "Look at what changed there, and run the same command again.",
            ) from error
        unchanged = f"{self.repo_id} is unchanged, the encoder is not published"
        status = status_of(error)
        if isinstance(error, TimeoutError):
            raise PublishError(
                f"The commit to {self.repo_id} got no answer in time. By now {unchanged}; it may still land.",
                "Run the same command again: what is published by then is recognised.",
            ) from error
        transient = status in RETRIED or status is None
        if not transient or attempt == ATTEMPTS:
            raise PublishError(f"The commit failed: {why} {unchanged.capitalize()}.", _remedy(status)) from error
        return _wait(error, attempt)

    def tag(self, name: str, commit: str) -> None:
        """Set a tag on a commit."""
        self.asked(
            f"set the tag {name!r}",
            lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=False),
        )

    def asked(self, what: str, ask: Callable[[], T]) -> T:
        """An answer of the Hub; one that it may give later is asked for again.

        Args:
            what: is asked of it, for errors: "read the files".
            ask: the call.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except OfflineModeIsEnabled as error:
                raise PublishError(
                    f"Offline mode is on, so that nothing can be published: {error}", "Unset HF_HUB_OFFLINE."
                ) from error
            except LocalTokenNotFoundError as error:
                raise PublishError("There is no token to publish with.", LOGIN) from error
            except (HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
                status = status_of(error)
                if attempt < ATTEMPTS and status in RETRIED:
                    time.sleep(_wait(error, attempt))
                    continue
                # the client has no other way up once it has chosen this one
                by_xet = status is None and "xet" in str(error).lower()
                raise PublishError(
                    f"Could not {what} of {self.repo_id}: {hidden(error, self.token)} What was visible there is "
                    "unchanged.",
                    WITHOUT_XET if by_xet else _remedy(status),
                ) from error
        raise AssertionError("the last attempt returns or raises")


def _same(path: Path, entry: Any) -> bool:
    """Whether a file on the Hub has the content of one here."""
    if getattr(entry, "size", None) != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(
            entry.lfs["sha256"] == sha256(path) if isinstance(entry.lfs, dict) else entry.lfs.sha256 == sha256(path)
        )
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _wait(error: Exception, attempt: int) -> float:
    """Seconds before another attempt: what the Hub asks for, else longer each time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_WAIT_S) if asked.replace(".", "", 1).isdigit() else float(2 ** (attempt - 1))


def _remedy(status: int | None) -> str:
    if status == 404:
        return "Check name, branch and token: a private repository is not found by a token that may not see it."
    if status == 401:
        return LOGIN
    if status == 403:
        return "This token may not write there: use one that may, or choose another owner."
    if status in (409, 412):
        return "Somebody else writes there: look at the repository, and run the same command again."
    return "Run the same command again later; weights that have arrived are not sent again."
