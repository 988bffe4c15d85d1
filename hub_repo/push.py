"""Publishes a folder to the Hub, in one commit or not at all.

    python -m hub_repo.push hub_repo/tiny me/tiny [--dry-run] [--private] [--revision BRANCH] [--tag NAME] ...

Law: the folder is checked whole before anything is sent, the Hub sees one commit on top of the one that the push was
planned from, and only files that differ are uploaded. What can remain of a push that failed is a new, empty repository
and uploads that no commit names. NOTE: not `HfApi.upload_folder`, which with Xet makes several commits.

The token is the one of this machine (`HF_TOKEN`, or `hf auth login`); it is never an argument and never shown.
"""

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from .folders.loading import quiet_transformers
from .hub.publishable import Limits, LocalFile, UnpublishableFolder, scan
from .hub.remote import MAIN, Published, PushError, Remote, Repository, Retries
from .model_card import check_card
from .verify import verify_folder

logger = logging.getLogger(__name__)

Change = Literal["new", "changed", "unchanged", "deleted", "kept"]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How a folder is published.

    Attributes:
        private: Visibility of the repository; None leaves it as it is, a new one at the default of its owner. That of
            an existing repository is never changed: asking for the other one is an error.
        revision: Branch, made from main if there is none, or an open pull request `refs/pr/N`; None is main.
        create_pr: Open a pull request against main instead of committing.
        tag: Tag to set on the commit; one that exists is an error.
        commit_message: First line of the commit.
        prune: Delete files of the repository that the folder does not have; `.gitattributes` stays.
        verify: Check the folder with `hub_repo.verify`, which loads it (10 to 30 seconds); False is for a caller that
            has just done so. What must never be published is looked for either way.
        trust: Let that check run code in the folder that is not this package's.
        limits: Largest files.
        retries: Of requests, after passing errors.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    commit_message: str | None = None
    prune: bool = False
    verify: bool = True
    trust: bool = False
    limits: Limits = field(default_factory=Limits)
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self):
        if self.create_pr and self.revision not in (None, MAIN):
            raise ValueError(
                f"create_pr=True opens a pull request against main; leave out revision={self.revision!r}."
            )
        if self.create_pr and self.tag is not None:
            raise ValueError(f"tag={self.tag!r} with create_pr=True: tag the commit after the pull request is merged.")
        for name in (self.revision, self.tag):
            if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w./-]*", name):
                raise ValueError(f"{name!r} is not a name for a branch or tag: letters, digits, and . _ - / only.")


@dataclass(frozen=True)
class FileChange:
    """What a push does to one path; `kept` is only on the Hub, and stays. `size` in bytes."""

    path: str
    size: int
    change: Change


@dataclass(frozen=True)
class Push:
    """What a push did, or would do.

    Attributes:
        repo_id: The repository.
        revision: Branch or pull request that was, or would be, written to.
        files: Every path of the folder and of the repository.
        left_out: Paths of the folder that are never published, such as `__pycache__`.
        new_repository: Whether the repository did not exist.
        oid: The commit that has these files; None after a dry run.
        commit_url: Its page.
        pr_url: The page of the new pull request.
        tag: The tag that was set.
    """

    repo_id: str
    revision: str
    files: tuple[FileChange, ...]
    left_out: tuple[str, ...] = ()
    new_repository: bool = False
    oid: str | None = None
    commit_url: str | None = None
    pr_url: str | None = None
    tag: str | None = None

    def count(self, *changes: Change) -> int:
        """Number of files with one of these changes."""
        return sum(file.change in changes for file in self.files)


def push(folder: str | Path, repo_id: str, *, dry_run: bool = False, **options) -> Push:
    """Publishes a folder as a model repository.

    Args:
        folder: A folder that `hub_repo.export` wrote, or one of that form.
        repo_id: `owner/name`.
        dry_run: Check and compare only; sends nothing but GET requests and needs no token for a public repository.
        **options: The fields of `PushOptions`.

    Returns:
        What was done, with the commit; where no file differs there is no new commit, and `oid` is the present one.

    Raises:
        UnpublishableFolder: The folder may not be published; names every reason.
        PushError: No token, no permission, a conflict, or the Hub cannot be reached; nothing was published, unless
            the message says so.
        ValueError: Options that contradict each other, or a malformed name.
        TypeError: An unknown option.
    """
    settings, folder = PushOptions(**options), Path(folder)
    _check_repo_id(repo_id)
    if not dry_run:
        _require_token()
    contents = scan(folder, settings.limits)
    files = {file.path: file for file in contents.files}
    if problems := contents.problems + _card_problems(folder):
        raise UnpublishableFolder(folder, problems)
    revision = settings.revision or MAIN
    repository = Repository(repo_id, revision=revision, retries=settings.retries, authenticated=not dry_run)
    remote = repository.read()
    _check_target(repo_id, remote, settings)
    if settings.verify:
        _verify(folder, settings.trust)
    new = remote.head is None
    if not dry_run and new:
        remote = _create(repository, settings)
    changes = compare(files, remote.files, prune=settings.prune)
    if stale := stale_weights(changes):
        logger.warning(
            "%s: %s on the Hub are of weights before these; --prune deletes what the folder has not.",
            repo_id, ", ".join(stale),
        )  # fmt: skip
    result = Push(repo_id, revision, changes, tuple(contents.left_out), new)
    if dry_run:
        return result
    published = _publish(repository, files, remote, settings)
    if settings.tag is not None:
        _tag(repository, settings.tag, published)
    return dataclasses.replace(
        result,
        revision=published.revision,
        oid=published.oid,
        commit_url=published.url,
        pr_url=published.pr_url,
        tag=settings.tag,
    )


def compare(files: dict[str, LocalFile], remote: dict[str, RepoFile], *, prune: bool) -> tuple[FileChange, ...]:
    """What makes the files of the repository those of the folder.

    Args:
        files: Path -> file of the folder.
        remote: Path -> file of the repository.
        prune: Whether what only the repository has is deleted.
    """
    changes = []
    for path in sorted(files.keys() | remote.keys()):
        if path not in files:
            change: Change = "deleted" if prune and path != ".gitattributes" else "kept"
        elif path not in remote:
            change = "new"
        else:
            change = "unchanged" if _is_same(files[path], remote[path]) else "changed"
        changes.append(FileChange(path, files[path].size if path in files else remote[path].size, change))
    return tuple(changes)


_WEIGHTS = ("*.safetensors", "*.safetensors.index*.json", "*.gguf", "onnx/*", "openvino/*")
"""Files that hold weights for one engine or another."""


def stale_weights(changes: Sequence[FileChange]) -> list[str]:
    """Files of weights that stay on the Hub beside new ones: another engine would go on with the old model."""

    def is_weights(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in _WEIGHTS)

    if not any(change.change in ("new", "changed") and is_weights(change.path) for change in changes):
        return []
    return [change.path for change in changes if change.change == "kept" and is_weights(change.path)]


def _is_same(local: LocalFile, remote: RepoFile) -> bool:
    if local.size != remote.size:
        return False
    return local.sha256 == remote.lfs.sha256 if remote.lfs else local.blob_id == remote.blob_id


def _publish(repository: Repository, files: dict[str, LocalFile], remote: Remote, settings: PushOptions) -> Published:
    """Uploads what differs and commits it to a repository that exists; reads the commit back."""
    changes = compare(files, remote.files, prune=settings.prune)
    additions = [CommitOperationAdd(c.path, files[c.path].source) for c in changes if c.change in ("new", "changed")]
    deletions = [CommitOperationDelete(c.path, is_folder=False) for c in changes if c.change == "deleted"]
    new_branch = remote.refs.head(repository.revision) is None
    if additions or deletions:
        repository.validate_card(files["README.md"].source.read_text(encoding="utf-8"))
        repository.upload(
            additions, revision=MAIN if new_branch else repository.revision, create_pr=settings.create_pr
        )
    if new_branch:
        repository.create_branch(remote.head)
    if not additions and not deletions:
        logger.info("%s: no file differs, nothing to commit", repository.repo_id)
        return Published(remote.head, repository.commit_url(remote.head), repository.revision)

    def is_ours(found: dict[str, RepoFile]) -> bool:
        return all(c.change in ("unchanged", "kept") for c in compare(files, found, prune=settings.prune))

    try:
        published = repository.commit(
            [*deletions, *additions],
            start=remote.head,
            message=settings.commit_message or f"Publish {repository.repo_id.split('/')[1]}",
            pull_requests=set(remote.refs.pull_requests) if settings.create_pr else None,
            is_ours=is_ours,
        )
    except PushError:
        if new_branch:
            repository.drop_branch(remote.head)
        raise
    if not is_ours(repository.files(published.revision if published.pr_url else published.oid)):
        raise PushError(f"{published.url} was made, but its files are not those of the folder; compare them.")
    return published


def _create(repository: Repository, settings: PushOptions) -> Remote:
    """Makes the repository; NOTE: the Hub ignores `private` for one that has appeared since, so it is read again."""
    repository.create(settings.private)
    remote = repository.read()
    if remote.head is None:
        raise PushError(f"{repository.repo_id} exists, but the token may not see it.")
    _check_target(repository.repo_id, remote, settings)
    return remote


def _tag(repository: Repository, name: str, published: Published):
    try:
        repository.tag(name, published.oid)
    except PushError as error:
        raise PushError(f"{published.url} is published, but has no tag {name}: {error}") from None


def _check_repo_id(repo_id: str):
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} has no owner; write owner/name.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r}: {error}") from None


def _require_token():
    token = get_token()
    if not token:
        raise PushError(
            "No Hugging Face token: run `hf auth login`, or set HF_TOKEN, with a token that has write permission."
        )
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would show it in its error
        raise PushError("The token in HF_TOKEN or of `hf auth login` has characters that no token has.")


def _card_problems(folder: Path) -> list[str]:
    if not (folder / "README.md").is_file():
        return ["README.md: missing; a published model has a card (python -m hub_repo.export --card CARD.md)"]
    try:
        return check_card((folder / "README.md").read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        return [f"README.md: not UTF-8 ({error})"]


def _check_target(repo_id: str, remote: Remote, settings: PushOptions):
    """Raises for what the repository's present state forbids, before anything is uploaded."""
    if remote.head is None and settings.create_pr:
        raise PushError(f"{repo_id} does not exist, or the token may not see it: no pull request is possible.")
    if remote.head is None:
        return
    if settings.private not in (None, remote.private):
        is_, asked = ("private", "public") if remote.private else ("public", "private")
        raise PushError(f"{repo_id} is {is_}, not {asked}; change that in its settings on the Hub, then push.")
    if settings.tag in remote.refs.tags:
        raise PushError(f"{repo_id} has a tag {settings.tag} already, at {remote.refs.tags[settings.tag][:12]}.")


def _verify(folder: Path, trust: bool):
    report = verify_folder(folder, trust=trust)
    if not report.ok:
        raise UnpublishableFolder(folder, [f"{error.file or 'folder'}: {error.message}" for error in report.errors])


def describe(result: Push) -> str:
    """A push for people: one line for each file that is not the same, then where it went."""
    lines = [
        f"{file.change:<9} {file.path}  {_size(file.size)}" for file in result.files if file.change != "unchanged"
    ]
    if unchanged := result.count("unchanged"):
        lines.append(f"unchanged {unchanged} files")
    lines += [f"left out  {path}" for path in result.left_out]
    upload = sum(file.size for file in result.files if file.change in ("new", "changed"))
    where = f"{result.repo_id}, {result.revision}{' (a new repository)' if result.new_repository else ''}"
    if result.oid is None:
        lines.append(f"dry run: nothing was sent; a push uploads {_size(upload)} to {where}")
    elif result.count("new", "changed", "deleted"):
        lines.append(f"published {_size(upload)} to {where}: {result.commit_url}")
    else:
        lines.append(f"nothing differs from {where}: {result.commit_url}")
    lines += [f"pull request: {result.pr_url}"] if result.pr_url else []
    lines += [f"tag: {result.tag}"] if result.tag else []
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: publishes and prints what was done; 2 if it was not."""
    parser = argparse.ArgumentParser(
        prog="hub_repo.push",
        description="Publish a folder to the Hub, in one commit.",
        epilog="The token is that of HF_TOKEN or `hf auth login`.",
    )
    parser.add_argument("folder", type=Path, help="folder to publish")
    parser.add_argument("repo_id", help="owner/name; created if there is none")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="only for you and your organisation")
    visibility.add_argument("--public", action="store_false", dest="private", help="for everybody")
    parser.add_argument("--revision", help="branch (made if there is none), or refs/pr/N; default main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--tag", help="tag for the commit")
    parser.add_argument("--commit-message", help="first line of the commit")
    parser.add_argument("--prune", action="store_true", help="delete files on the Hub that the folder does not have")
    parser.add_argument("--trust", action="store_true", help="run the folder's code although it is not the package's")
    parser.add_argument("--dry-run", action="store_true", help="check, compare, and send nothing")
    options = vars(parser.parse_args(argv))
    quiet_transformers()
    try:
        result = push(**options)
    except (ValueError, OSError, ImportError, PushError) as error:  # UnpublishableFolder is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
