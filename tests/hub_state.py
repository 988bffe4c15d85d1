"""What a Hub keeps: repositories of commits, refs, uploads, users, and the faults that a test asked for."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.onnx filter=lfs diff=lfs merge=lfs -text\n"
LFS_ABOVE = 10_000_000  # bytes


@dataclass(frozen=True)
class Blob:
    """Content of a file, and whether it is kept in LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit: all files of it, and the paths that it changed."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]
    changed: tuple[str, ...] = ()


@dataclass
class Repo:
    """Refs ("refs/heads/main", "refs/tags/v1", "refs/pr/1") -> commit; commits by oid."""

    private: bool
    gated: bool = False  # everybody sees what there is, its owner alone the content
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, the newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class Refusal(Exception):
    """An answer with an error status, in the form of the Hub's."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method and path, after the first `after` ones.

    `how` is an HTTP status; "drop": the connection ends before the request is read; "cut": in the middle of its body;
    "lose": after the request was carried out, before the answer; "halve": in the middle of the answer; "echo": 500
    that repeats the Authorization header; or a function that is called before the request is carried out, as another
    user's request would be.
    """

    method: str
    path: str
    how: int | str | Callable[[], None]
    times: float = 1  # math.inf for ever
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path) or self.times == 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass(repr=False)  # it holds every file
class Hub:
    """State of the server. `users` is token -> (name, may write); `log` is (method, path) of every request."""

    users: dict[str, tuple[str, bool]]
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)  # bytes that were sent of the content of a path
    page_size: int = 10  # entries of a tree
    part_size: int | None = None  # bytes of a part of an LFS upload; None is one piece
    xet_store: str | None = None  # folder of Xet's chunks; None: a Hub without Xet
    xet_hashes: dict[str, str] = field(default_factory=dict)  # sha256 of a file -> its Xet hash, which its shards say
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def writes(self) -> list[str]:
        """Requests that were not GET or HEAD."""
        return [f"{method} {path}" for method, path in self.log if method not in ("GET", "HEAD")]

    def seen(self, method: str, pattern: str) -> int:
        """How many requests of a method had a path like this."""
        return sum(m == method and bool(re.search(pattern, path)) for m, path in self.log)

    def commit(
        self,
        repo_id: str,
        changes: dict[str, Blob | None],
        *,
        title: str,
        ref: str = "refs/heads/main",
        parent: str | None = None,
    ) -> Commit:
        """Puts a commit on a ref, on top of its own or of `parent`: path -> new content, or None to delete it."""
        with self.lock:
            repo = self.repos[repo_id]
            parent = parent or repo.refs.get(ref)
            files = dict(repo.commits[parent].files) if parent else {}
            for path, blob in changes.items():
                if blob is None:
                    del files[path]
                else:
                    files[path] = blob
            identity = f"{parent} {title} {len(repo.commits)} {sorted((p, b.oid) for p, b in files.items())}"
            commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, files, tuple(sorted(changes)))
            repo.commits[commit.oid] = commit
            repo.refs[ref] = commit.oid
            return commit


def card_errors(text: str) -> list[str]:
    """What the Hub would say about the metadata of a card."""
    block = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
        if not isinstance(data, dict):
            return ["metadata is not a mapping"]
        if "model-index" in data:
            model_index_to_eval_results(data["model-index"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{type(error).__name__}: {error}"]
    licence = data.get("license")
    return [] if licence is None or re.fullmatch(r"[a-z0-9.+-]+", str(licence)) else ['"license" must be one of [...]']
