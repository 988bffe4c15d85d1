"""One model repository on the Hub: read, and written in one commit.

Law: a commit is sent again only after its branch, or the list of pull requests, was read and does not show it: an
answer can be lost, or be a 500, although the commit was made. What is uploaded before the commit is invisible until
then. An error becomes one line, which never carries the token; the token itself stays inside huggingface_hub.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever this huggingface_hub is built on
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MAIN = "main"
_PASSING = (408, 429, 500, 502, 503, 504)  # those that huggingface_hub's own back-off repeats
_CONFLICT = (409, 412)
_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # HfHubHTTPError is an OSError
_ADVICE = {
    401: "The Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not do this: it needs write permission for the repository.",
    404: "It does not exist, or the token may not see it.",
}


class PushError(RuntimeError):
    """A push was refused or failed; the message is one line that names the repository and the reason."""


@dataclass(frozen=True)
class Retries:
    """`count` further attempts after a passing error, the first after `wait` seconds, then twice as long each time."""

    count: int = 5
    wait: float = 1.0

    def waits(self) -> Iterator[float | None]:
        """Seconds to wait after each attempt; None after the last."""
        yield from (self.wait * 2**i for i in range(self.count))
        yield None


class Refs(NamedTuple):
    """What points to commits: name -> commit; pull requests by reference, `refs/pr/1`."""

    branches: dict[str, str]
    tags: dict[str, str]
    pull_requests: dict[str, str]

    def head(self, revision: str) -> str | None:
        """The commit of a branch or pull request."""
        return self.branches.get(revision, self.pull_requests.get(revision))


@dataclass(frozen=True)
class Remote:
    """What is on the Hub before a push.

    Attributes:
        head: Commit that the push starts from, of the branch or else of main; None if there is no repository.
        private: The visibility of the repository.
        refs: Its branches, tags and pull requests.
        files: Path -> size and hash, at `head`.
    """

    head: str | None = None
    private: bool | None = None
    refs: Refs = field(default_factory=lambda: Refs({}, {}, {}))
    files: dict[str, RepoFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A commit on the Hub; `revision` is the branch or pull request that it heads."""

    oid: str
    url: str
    revision: str
    pr_url: str | None = None


class Repository:
    """The requests of a push. Every method raises `PushError` when the Hub refuses or cannot be reached.

    Args:
        repo_id: `owner/name`.
        revision: Branch, or `refs/pr/N`.
        retries: For the requests that huggingface_hub sends once only; uploads and listings it repeats itself.
        authenticated: Always send the token of this machine, or fail; otherwise only if there is one.
    """

    def __init__(self, repo_id: str, *, revision: str, retries: Retries, authenticated: bool):
        self.repo_id, self.revision, self.retries = repo_id, revision, retries
        self.api = HfApi(token=True if authenticated else None)

    def read(self) -> Remote:
        """The state that a push starts from; a repository that the token may not see is taken as missing."""
        try:
            info = self._attempt(
                "read the repository", lambda: self.api.model_info(self.repo_id), (RepositoryNotFoundError,)
            )
        except RepositoryNotFoundError:
            return Remote()
        refs = self._refs()
        head = refs.head(self.revision)
        if head is None and self.revision.startswith("refs/"):
            raise PushError(f"{self.repo_id} has no {self.revision}.")
        if head is None and self.revision in refs.tags:
            raise PushError(f"{self.repo_id}: {self.revision} is a tag; push to a branch.")
        head = head or refs.branches.get(MAIN, info.sha)
        return Remote(head, bool(info.private), refs, self.files(head))

    def files(self, revision: str) -> dict[str, RepoFile]:
        """Path -> size and hash of the files at a revision."""

        def listing() -> dict[str, RepoFile]:
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        return self._attempt("list the files", listing)

    def create(self, private: bool | None):
        """Creates the repository; that it exists is no error, as an answer may have been lost."""
        self._attempt(
            "create the repository", lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        )

    def create_branch(self, start: str):
        """Creates the branch at a commit."""
        self._attempt(
            f"create the branch {self.revision}",
            lambda: self.api.create_branch(self.repo_id, branch=self.revision, revision=start, exist_ok=True),
        )

    def drop_branch(self, start: str):
        """Takes back a branch that this push made, if it still is where it started; a failure is only logged."""
        try:
            if self._refs().branches.get(self.revision) == start:
                self.api.delete_branch(self.repo_id, branch=self.revision)
        except _ERRORS as error:
            logger.warning("%s: the new branch %s is left: %s", self.repo_id, self.revision, one_line(error))

    def validate_card(self, text: str):
        """Has the Hub check the metadata of a card as it will at the commit, but before anything is uploaded."""
        self._attempt("have the card checked", ModelCard(text).validate)

    def upload(self, additions: list[CommitOperationAdd], *, revision: str, create_pr: bool):
        """Uploads what goes to LFS (or Xet); nothing of it is visible until a commit names it."""
        try:
            self.api.preupload_lfs_files(
                self.repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False
            )
        except _ERRORS as error:
            raise self._failed("upload the files", error) from None
        # TRAP: what a .gitignore on the Hub lists is dropped from the commit without an error.
        if ignored := [addition.path_in_repo for addition in additions if getattr(addition, "_should_ignore", False)]:
            raise PushError(f"{self.repo_id}: its .gitignore leaves out {', '.join(ignored)}; delete it there first.")

    def commit(
        self,
        operations: list[CommitOperationAdd | CommitOperationDelete],
        *,
        start: str,
        message: str,
        pull_requests: set[str] | None,
        is_ours: Callable[[dict[str, RepoFile]], bool],
    ) -> Published:
        """Makes one commit on top of `start`, once, whatever becomes of the answers.

        Args:
            operations: Additions, uploaded, and deletions.
            start: Commit that the operations were derived from; the Hub refuses them if the branch has moved.
            message: First line of the commit.
            pull_requests: Not None: open a pull request, and these are those there were before.
            is_ours: Whether the files of a commit are those that this one is to have.
        """
        for wait in self.retries.waits():
            try:
                info = self.api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=self.revision,
                    create_pr=pull_requests is not None, parent_commit=start,
                )  # fmt: skip
                return Published(info.oid, info.commit_url, info.pr_revision or self.revision, info.pr_url)
            except _ERRORS as error:
                failure = error
            if not _is_passing(failure) and _status(failure) not in _CONFLICT:
                break
            if published := self._landed(start, pull_requests, is_ours):
                return published
            if _status(failure) in _CONFLICT:
                raise PushError(
                    f"{self.repo_id}: {self.revision} has moved on from {start[:12]}, somebody else pushed; nothing "
                    "was published. See what is there, then push again."
                )
            if wait is None:
                break
            _pause(wait, failure)
        raise self._failed("commit", failure)

    def _landed(self, start: str, pull_requests: set[str] | None, is_ours: Callable) -> Published | None:
        """The commit whose answer was lost, if it was made: a moved branch or new pull request with our files."""
        refs = self._refs()
        if pull_requests is None:
            moved = {self.revision: head} if (head := refs.head(self.revision)) not in (start, None) else {}
        else:
            moved = {ref: head for ref, head in refs.pull_requests.items() if ref not in pull_requests}
        for revision, oid in moved.items():
            if is_ours(self.files(revision)):
                page = f"{self.api.endpoint}/{self.repo_id}/discussions/{revision.rsplit('/', 1)[-1]}"
                return Published(oid, self.commit_url(oid), revision, None if pull_requests is None else page)
        return None

    def commit_url(self, oid: str) -> str:
        """The page of a commit."""
        return f"{self.api.endpoint}/{self.repo_id}/commit/{oid}"

    def tag(self, name: str, oid: str):
        """Tags a commit; that it has this tag is no error, as an answer may have been lost."""

        def once():
            try:
                self.api.create_tag(self.repo_id, tag=name, revision=oid)
            except HfHubHTTPError as error:
                if _status(error) != 409 or self._refs().tags.get(name) != oid:
                    raise

        self._attempt(f"set the tag {name}", once)

    def _refs(self) -> Refs:
        refs = self._attempt(
            "list the branches", lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        )
        return Refs(
            {branch.name: branch.target_commit for branch in refs.branches},
            {tag.name: tag.target_commit for tag in refs.tags},
            {pull.ref: pull.target_commit for pull in refs.pull_requests or []},
        )

    def _attempt(self, what: str, call: Callable[[], Result], expected: tuple[type[Exception], ...] = ()) -> Result:
        """Calls, again after passing errors; an `expected` error is left to the caller."""
        for wait in self.retries.waits():
            try:
                return call()
            except (PushError, *expected):
                raise
            except _ERRORS as error:
                failure = error
            if wait is None or not _is_passing(failure):
                break
            _pause(wait, failure)
        raise self._failed(what, failure)

    def _failed(self, what: str, error: Exception) -> PushError:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # of an LFS upload
        said = f"{self.repo_id}: could not {what}: {one_line(cause).rstrip('.')}."
        advice = _ADVICE.get(_status(cause))
        return PushError(f"{said} {advice}" if advice else said)


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the connection, the server or its rate limit, not the request."""
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING
    return isinstance(error, (HTTPError, json.JSONDecodeError))  # a gateway's error page is not JSON


def _pause(seconds: float, error: Exception):
    """Waits, as long as the server asks for if that is longer."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    seconds = max(seconds, float(asked)) if asked.isdigit() else seconds
    logger.warning("%s; again in %.1f seconds", one_line(error), seconds)
    time.sleep(seconds)


def one_line(error: BaseException) -> str:
    """What went wrong, without the token should the server have sent it back."""
    status, said = _status(error), getattr(error, "server_message", None)
    text = f"{status} {said}" if said else str(error) or type(error).__name__
    text = " ".join(text.split())
    token = get_token()
    return text.replace(token, "<token>") if token else text
