"""A repository on the Hub, written to so that what stands there is known afterwards.

The Hub's client does not retry a commit, sets no time limit, and raises when only the answer was lost. So every
question has a time limit of its own here, a commit names the state that it was made from, and after any failure the
repository is read again before anything is said about it.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError

from pivot_plugin import __version__
from pivot_plugin.deadline import Overdue, within
from pivot_plugin.errors import PublishError
from pivot_plugin.files import sha256

from .secrets import HTTP_ERROR, hidden, status_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
COMMIT_LIMIT_S = 180.0
ANSWER_LIMIT_S = 60.0
ATTEMPTS = 4
LONGEST_WAIT_S = 60.0
RETRIED = (408, 425, 429, 500, 502, 503, 504)
# what a repository may hold from its creation
NEW_REPO_FILES = (".gitattributes", "README.md")
WITHOUT_XET = "A Hub without a Xet store? Set HF_HUB_DISABLE_XET=1 and run the same command again."
LOGIN = "Log in with a token that may write (hf auth login), or pass token=."
AGAIN = "Run the same command again later: what is published is recognised."


Files = Mapping[str, Path]
"""Of a publication: from names in the repository to files here."""


@dataclass(frozen=True)
class State:
    """A branch, tag or pull request at one moment.

    Attributes:
        commit: it stands at.
        names: of its files.
        tags: of its card.
        private: whether its repository is.
    """

    commit: str
    names: frozenset[str]
    tags: frozenset[str]
    private: bool


@dataclass(frozen=True)
class Publishing:
    """What kind of thing is published.

    Attributes:
        noun: for it, with its article, in the singular: "the encoder".
        repo_type: "model" or "dataset".
        is_ours: whether a state is an earlier publication of this kind.
        goes: whether a file of an earlier one, which is not part of the new one, is to go.
    """

    noun: str
    repo_type: Literal["model", "dataset"]
    is_ours: Callable[[State], bool]
    goes: Callable[[str], bool]

    def stale(self, state: State, names: Collection[str]) -> list[str]:
        """Files of an earlier publication that are not part of a new one.

        Args:
            state: that stands there.
            names: of the new one's files.
        """
        if not self.is_ours(state):
            return []
        return sorted(name for name in state.names.difference(names) if self.goes(name))


class Hub:
    """One branch of one repository, and what can be known of it.

    Every method raises PublishError where the Hub refuses or fails. What it says of the state there is what is known at
    that point: before the commit no file can have changed, after it everything is read again.

    Args:
        repo_id: "owner/name".
        revision: the branch.
        token: that may write; the one you are logged in with where None.
        publishing: what is.
    """

    def __init__(self, repo_id: str, revision: str, token: str | None, publishing: Publishing) -> None:
        self.api = HfApi(token=token, library_name="pivot_plugin", library_version=__version__)
        self.repo_id, self.revision, self.token, self.publishing = repo_id, revision, token, publishing
        self.repo_type = publishing.repo_type

    def create(self, private: bool | None) -> None:
        """Make sure of the repository."""
        self._before(
            "create the repository",
            lambda: self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True),
        )

    def begin(self, private: bool | None, exist_ok: bool) -> State | None:
        """Make sure of a repository that may be written to.

        Args:
            private: of one that is created; one that exists and is public is refused with True.
            exist_ok: write beside what is not ours.

        Returns:
            what stands on the branch; None where it does not exist.

        Raises:
            PublishError: if it may not be written to; nothing there was changed then.
        """
        self.create(private)
        state = self.state(self.revision)
        # a branch that is made begins as the main one, and is not made for what may not be written there
        standing = state or self.state("main")
        if standing is not None:
            if private and not standing.private:
                raise PublishError(
                    f"{self.repo_id} exists and is public, and {self.publishing.noun} is to be private. Nothing was "
                    "changed.",
                    "Choose another name, or make the repository private in its settings.",
                )
            if not exist_ok:
                self.refuse_others(standing)
        return state

    def create_branch(self) -> None:
        """Make the branch, from the main one."""
        self._before(
            f"create the branch {self.revision!r}",
            lambda: self.api.create_branch(self.repo_id, branch=self.revision, repo_type=self.repo_type, exist_ok=True),
        )

    def state(self, revision: str) -> State | None:
        """What stands at a revision; None where it does not exist."""

        def read() -> State | None:
            try:
                info: Any = self.api.repo_info(
                    self.repo_id, revision=revision, repo_type=self.repo_type, timeout=ANSWER_LIMIT_S
                )
            except RevisionNotFoundError:
                return None
            names = frozenset(str(file.rfilename) for file in info.siblings or [])
            return State(str(info.sha), names, frozenset(map(str, info.tags or [])), bool(info.private))

        return self._asked("read the repository", read)

    def refuse_others(self, state: State) -> None:
        """Refuse a repository that holds what is not ours.

        Raises:
            PublishError: with the first of its files.
        """
        others = sorted(state.names - set(NEW_REPO_FILES))
        if others and not self.publishing.is_ours(state):
            raise PublishError(
                f"{self.repo_id} holds something else already: {', '.join(others[:5])}. Nothing was changed.",
                "Choose another name, or pass exist_ok=True (--exist-ok): its other files stay.",
            )

    def holds(self, files: Files, commit: str) -> bool:
        """Whether a commit holds files with exactly these contents."""
        present = self._asked(
            "read the files",
            lambda: {
                str(entry.path): entry
                for entry in self.api.get_paths_info(
                    self.repo_id, list(files), revision=commit, repo_type=self.repo_type
                )
            },
        )
        return all(name in present and _same(path, present[name]) for name, path in files.items())

    def is_this(self, state: State, files: Files) -> bool:
        """Whether a state is this publication: all of its files, and none of an earlier one that has to go."""
        return (
            state.names >= files.keys()
            and not self.publishing.stale(state, files.keys())
            and self.holds(files, state.commit)
        )

    def url(self, commit: str) -> str:
        """The address of a commit."""
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.api.endpoint}/{kind}{self.repo_id}/commit/{commit}"

    def pull_request(self, files: Files, message: str) -> tuple[str, str] | None:
        """Commit and address of an open pull request of this publication; None where there is none."""

        def read() -> list[Any]:
            found = self.api.get_repo_discussions(
                self.repo_id, discussion_type="pull_request", discussion_status="open", repo_type=self.repo_type
            )
            return [one for one in found if one.title == message and one.git_reference]

        for proposed in self._asked("read the pull requests", read):
            state = self.state(proposed.git_reference)
            if state is not None and self.is_this(state, files):
                return state.commit, str(proposed.url)
        return None

    def publish(self, files: Files, before: State, message: str, create_pr: bool, time_limit: float) -> tuple[str, str]:
        """Make one commit of all files; after a failure find out what became of it.

        Args:
            files: of the publication.
            before: what stands on the branch; what of it is of an earlier publication alone goes.
            message: first line of the commit.
            create_pr: propose it as a pull request.
            time_limit: seconds that the commit may take.

        Returns:
            its id and its address, or that of the pull request.
        """
        stale = self.publishing.stale(before, files.keys())
        for attempt in range(1, ATTEMPTS + 1):
            # anew for each attempt: the client notes in them what it found on the branch
            additions = [CommitOperationAdd(name, path) for name, path in files.items()]
            self._upload(additions, create_pr)
            operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
            try:
                made = within(
                    time_limit,
                    lambda operations=operations: self.api.create_commit(  # type: ignore[misc]
                        self.repo_id,
                        operations,
                        commit_message=message,
                        repo_type=self.repo_type,
                        revision=self.revision,
                        parent_commit=before.commit,
                        create_pr=create_pr or None,
                    ),
                )
                self._refuse_mixture(str(made.oid), files)
                return str(made.oid), str(made.pr_url or made.commit_url)
            except PublishError:
                raise
            # the client raises its own errors, those of its HTTP library, and those of the disk
            except Exception as error:
                found = self._found_after(error, files, before, message, create_pr)
                if found is not None:
                    holder, commit, address = found
                    logger.warning("The answer to the commit was lost, but %s holds all files at %s.", holder, commit)
                    return commit, address
                wait = self._wait_for_another(error, attempt, create_pr)
                logger.warning("The commit failed (%s) and is tried again in %.0f s.", hidden(error, self.token), wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _refuse_mixture(self, commit: str, files: Files) -> None:
        """Notice where the client made no commit, because somebody else had just put the same files there, and more.

        Raises:
            PublishError: with one of the files that should have gone.
        """
        try:
            state = self.state(commit)
        except PublishError:
            # that the commit was made is known from its own answer
            return
        if state is not None and (stale := self.publishing.stale(state, files.keys())):
            raise PublishError(
                f"{self.repo_id} changed while {self.publishing.noun} was published: beside its files {stale[0]} of "
                "somebody else stands there.",
                "Run the same command again: it replaces all of what is there, or nothing.",
            )

    def _upload(self, additions: list[CommitOperationAdd], create_pr: bool) -> None:
        """Send large files; nothing of them can be seen before the commit. It takes what time it takes."""
        self._before(
            "upload the files",
            lambda: self.api.preupload_lfs_files(
                self.repo_id,
                additions,
                repo_type=self.repo_type,
                revision=self.revision,
                create_pr=create_pr or None,
                # the commit's own upload step must find them sent
                free_memory=False,
            ),
            limit=None,
        )

    def _found_after(
        self, error: Exception, files: Files, before: State, message: str, create_pr: bool
    ) -> tuple[str, str, str] | None:
        """Where the commit stands that failed all the same, its id and its address; None where nothing has changed.

        Raises:
            PublishError: if that cannot be read, or somebody else has changed the branch.
        """
        why = hidden(error, self.token)
        try:
            if create_pr:
                proposed = self.pull_request(files, message)
                return None if proposed is None else (f"the pull request {proposed[1]}", *proposed)
            now = self.state(self.revision)
            if now is None:
                raise PublishError(f"{self.repo_id} has no branch {self.revision!r} any more.", AGAIN)
            if now.commit == before.commit:
                return None
            if self.is_this(now, files):
                return self.repo_id, now.commit, self.url(now.commit)
        except PublishError as unread:
            raise PublishError(
                f"The commit to {self.repo_id} failed: {why} Whether it has landed is not known. {unread.finding}",
                AGAIN,
            ) from error
        raise PublishError(
            f"{self.repo_id} changed while {self.publishing.noun} was published: it is at {now.commit[:12]}, was at "
            f"{before.commit[:12]}. {self.publishing.noun.capitalize()} is not published.",
            "Look at what changed there, and run the same command again: it replaces all of what is there, or nothing.",
        ) from error

    def _wait_for_another(self, error: Exception, attempt: int, create_pr: bool) -> float:
        """Seconds before another attempt.

        Raises:
            PublishError: if another would not help; nothing has changed then.
        """
        why = hidden(error, self.token)
        unchanged = (
            f"no pull request with these files is open at {self.repo_id}"
            if create_pr
            else f"{self.repo_id} is unchanged, {self.publishing.noun} is not published"
        )
        if isinstance(error, TimeoutError):
            raise PublishError(
                f"The commit to {self.repo_id} got no answer in time. By now {unchanged}; it may still land.", AGAIN
            ) from error
        if not _may_pass(error) or attempt == ATTEMPTS:
            raise PublishError(
                f"The commit failed: {why} {unchanged[0].upper()}{unchanged[1:]}.", _remedy(status_of(error))
            ) from error
        return _wait(error, attempt)

    def tagged(self, name: str) -> str | None:
        """The commit that a tag is on; None where there is no such tag."""
        refs = self._asked("read the tags", lambda: self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type))
        return next((str(tag.target_commit) for tag in refs.tags if tag.name == name), None)

    def tag(self, name: str, commit: str, files: Files) -> None:
        """Set a tag on a commit, or find it set; on another commit of the same files is as good.

        Raises:
            PublishError: if it is not set, is on something else, or if that is not known, with which.
        """
        try:
            self._asked(
                f"set the tag {name!r}",
                lambda: self.api.create_tag(
                    self.repo_id, tag=name, revision=commit, repo_type=self.repo_type, exist_ok=False
                ),
            )
        except PublishError as error:
            try:
                on = self.tagged(name)
                if on is not None and (on == commit or self.holds(files, on)):
                    return
            except PublishError as unread:
                raise PublishError(
                    f"Whether its tag {name!r} is set is not known: {error.finding} {unread.finding}", AGAIN
                ) from error
            if on is not None:
                raise PublishError(
                    f"Its tag is not set: {name!r} is on {on[:12]}, which is something else.", "Choose another tag."
                ) from error
            raise PublishError(f"Its tag is not set: {error.finding}", error.remedy) from error

    def _before(self, what: str, ask: Callable[[], T], limit: float | None = ANSWER_LIMIT_S) -> T:
        """An answer to what comes before the commit, when no file there can have changed."""
        try:
            return self._asked(what, ask, limit)
        except PublishError as error:
            raise PublishError(f"{error.finding} No file there was changed.", error.remedy) from error.__cause__

    def _asked(self, what: str, ask: Callable[[], T], limit: float | None = ANSWER_LIMIT_S) -> T:
        """An answer of the Hub; one that it may give later is asked for again.

        Args:
            what: is asked of it, for errors: "read the files".
            ask: the call; one that may be repeated.
            limit: seconds to wait for it.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask() if limit is None else within(limit, ask)
            except OfflineModeIsEnabled as error:
                raise PublishError(
                    f"Offline mode is on, so that nothing can be published: {error}", "Unset HF_HUB_OFFLINE."
                ) from error
            except LocalTokenNotFoundError as error:
                raise PublishError("There is no token to publish with.", LOGIN) from error
            # the client raises its own errors, those of its HTTP library, of what it cannot parse, and of the disk
            except Exception as error:
                status = status_of(error)
                if attempt < ATTEMPTS and _may_pass(error):
                    time.sleep(_wait(error, attempt))
                    continue
                # the client has no other way up once it has chosen this one
                by_xet = status is None and "xet" in str(error).lower()
                raise PublishError(
                    f"Could not {what} of {self.repo_id}: {hidden(error, self.token)}.",
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


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: of a refusal that says so, and of a connection that broke."""
    if isinstance(error, Overdue):
        return False
    status = status_of(error)
    return status in RETRIED or (status is None and isinstance(error, HTTP_ERROR | ConnectionError))


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
    return "Run the same command again later; what has arrived is not sent again."
