"""The steps of corpus preparation that datatrove does not have: reading sources, language, counting, token shards.

Law: what a step removes is counted (documents, words, characters, a reason) and never silently skipped, and a shard
that carries its final name is whole. Importing this loads no model and no tokenizer; tasks load theirs when they run.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import resource
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from .recipe import RecipeError, Source

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])
_FILES = 10240  # open at a time, where no limit is said
_BATCH_CHARACTERS = 1_000_000  # tokenised at once; the encodings of a batch take about 200 bytes a token
_EXAMPLE_CHARACTERS = 400
_ROWS = 1000  # decoded at once


class Words(WhitespaceTokenizer):
    """Words are what whitespace separates; sentences end at terminal punctuation.

    datatrove's own tokenizers for English want spaCy. MinHash sees text without punctuation, where the two agree; the
    quality filters count a word and the comma after it as one.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


def hold(path: str, *, alone: bool = False):
    """Holds a lock file until this process ends.

    TRAP: workers outlive a killed parent until their task is done. A run that resumed beside them would write the same
    files, so tasks hold the file together and a run that starts needs it alone first.

    Args:
        path: The lock file; it is created.
        alone: Fail if another process holds it; it is then held together with others.

    Raises:
        RecipeError: `alone`, and another process holds it.
    """
    # A POSIX lock: it belongs to the process, forked children do not inherit it. Closing any descriptor of the file
    # would give it up.
    descriptor = _descriptor(path, os.getpid())
    if alone:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecipeError(
                f"{path} is held: tasks of another run are still at work there; wait for them."
            ) from error
    fcntl.lockf(descriptor, fcntl.LOCK_SH)


@functools.cache
def _descriptor(path: str, process: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


class Hold(PipelineStep):
    """First step of a task: the process holds the lock file of the output folder."""

    type = "LOCK"
    name = "hold"

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        hold(self.path)
        return data


class OpenFiles(PipelineStep):
    """First step of a task that opens a file for every task of an earlier stage: as many as the system allows it."""

    type = "LIMIT"
    name = "open files"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
            wanted = max(now, _FILES) if most == resource.RLIM_INFINITY else most
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return data


def tally(step: PipelineStep, source: str, text: str):
    """Counts a document, its words and characters in a step's statistics, under "SOURCE|UNIT"."""
    for unit, value in (("documents", 1), ("words", len(text.split())), ("characters", len(text))):
        step.stat_update(f"{source}|{unit}", value=value)


class Tally(PipelineStep):
    """Counts what passes, by source; the difference of two tallies is what the step between them removed."""

    type = "TALLY"

    def __init__(self, name: str):
        self.name = name
        super().__init__()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            with self.track_time():
                tally(self, document.metadata["source"], document.text)
            yield document


class CorpusReader(PipelineStep):
    """The rows of a source as documents, read as stage I reads them.

    Unlike datatrove's file readers it shares a file out among tasks where there are fewer files than tasks, and a line
    that cannot be read is an error instead of a document less. Rows without text are counted and left out.
    """

    type = "READER"

    def __init__(self, source: Source, data_dir: str):
        self.name = source.name
        super().__init__()
        self.source = source
        self.data_dir = data_dir

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from .source_files import open_source, readable, text_of

        yield from data or ()
        name, column = self.source.name, self.source.text
        rows = open_source(self.source, self.data_dir, streaming=True).select_columns([column])
        for index, row in readable(self.source, share(rows, rank, world_size)):
            text_of(row[column], self.source, column, index)
            text = row[column] or ""
            tally(self, name, text)
            if text.strip():
                yield Document(text=text, id=f"{name}/{rank:05d}/{index}", metadata={"source": name})


def share(rows: Any, rank: int, world_size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one task: whole files, or every n-th row of a file where there are more tasks than files.

    COST: all tasks of a file decode it, but only a task's own rows become Python objects, which takes longer.

    Args:
        rows: A streaming `datasets.IterableDataset`.
        rank: Of the task.
        world_size: Tasks in all; their shares are disjoint and together complete.

    Yields:
        The row's index in the files that the task reads, and the row.
    """
    files = rows.num_shards
    file, stripe = rank % files, rank // files
    stripes = 1 if files >= world_size else len(range(file, world_size, files))
    part = rows.shard(num_shards=min(files, world_size), index=file, contiguous=False).with_format("arrow")
    start = 0
    for table in part.iter(batch_size=_ROWS):
        own = range((stripe - start) % stripes, len(table), stripes)
        yield from zip((start + row for row in own), table.take(pa.array(own, pa.int64())).to_pylist(), strict=True)
        start += len(table)


class LinguaFilter(BaseFilter):
    """Keeps documents in some languages; lingua's models lie in its wheel, nothing is downloaded.

    COST: about proportional to the characters looked at, so a longer text is judged by three windows of it.
    """

    type = "FILTER"
    name = "language"

    def __init__(
        self, keep: list[str], threshold: float, characters: int, exclusion_writer: JsonlWriter | None = None
    ):
        super().__init__(exclusion_writer)
        self.keep = {code.upper() for code in keep}
        self.threshold = threshold
        self.characters = characters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Kept if `keep` has at least `threshold` of the confidence; else the reason is the likeliest language."""
        values = _detector().compute_language_confidence_values(windows(doc.text, self.characters))
        codes = {value.language.iso_code_639_1.name: value.value for value in values}
        if sum(codes.get(code, 0.0) for code in self.keep) >= self.threshold:
            return True
        best = max(codes, key=codes.__getitem__)
        if best in self.keep or codes[best] == 0.0:  # no letters at all, or no language that stands out
            return False, "unsure"
        return False, best.lower()


@functools.cache
def _detector() -> Any:
    from lingua import LanguageDetectorBuilder

    # Low accuracy is trigrams alone, which high accuracy uses too for texts above 120 characters.
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def windows(text: str, characters: int) -> str:
    """The beginning, middle and end of a text, `characters` in all; a shorter text as it is.

    >>> windows("aaaa bbbb cccc", 9)
    'aaa\\nbbb\\nccc'
    """
    if len(text) <= characters:
        return text
    size = max(characters // 3, 1)
    middle = (len(text) - size) // 2
    return "\n".join((text[:size], text[middle : middle + size], text[-size:]))


class QualityFilter(BaseFilter):
    """A filter of datatrove on the documents of some sources; the others pass."""

    type = "FILTER"

    def __init__(self, name: str, inner: BaseFilter, skipped: list[str], exclusion_writer: JsonlWriter | None = None):
        self.name = name
        super().__init__(exclusion_writer)
        inner.stats = self.stats  # its counts of lines belong to this step
        self.inner = inner
        self.skipped = frozenset(skipped)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["source"] in self.skipped:
            return True
        verdict = self.inner.filter(doc)
        if (
            verdict is True and not doc.text.strip()
        ):  # filters by line may leave none, and the next one divides by them
            return False, "nothing_left"
        return verdict


class Removed(JsonlWriter):
    """Writes removed documents: all of them whole, or the first of each source and reason cut short."""

    def __init__(self, folder: str, limit: int | None):
        super().__init__(folder)
        self.limit = limit
        self.seen: Counter = Counter()

    def write(self, document: Document, rank: int = 0, **kwargs: Any):
        if self.limit is None:
            return super().write(document, rank, **kwargs)
        reason = document.metadata["source"], document.metadata.get("filter_reason")
        self.seen[reason] += 1
        if self.seen[reason] <= self.limit:
            super().write(replace(document, text=document.text[:_EXAMPLE_CHARACTERS]), rank, **kwargs)


def in_heldout_share(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out share: decided by its own words alone, whatever case and whitespace."""
    from .sources import is_heldout

    return is_heldout(" ".join(text.lower().split()).encode(), share)


def load_tokenizer(name: str) -> tuple[Any, dict[str, str]]:
    """A tokenizer, and what identifies it in the metadata of shards.

    Args:
        name: Folder or Hub name.

    Returns:
        The tokenizer, and {"tokenizer": its name, "vocab_size": ..., "tokenizer_sha256": of its tokenizer.json}.

    Raises:
        RecipeError: There is none, or it has no tokenizer.json.
    """
    from transformers.utils import cached_file

    import modeling_jina_bert  # noqa: F401  registers its configuration: nobody is asked to trust a folder of ours

    from .sources import open_tokenizer

    tokenizer = open_tokenizer(name)
    try:
        path = cached_file(name, "tokenizer.json")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"tokenizer={name!r} has no tokenizer.json: {reason}") from error
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return tokenizer, {"tokenizer": name, "vocab_size": str(len(tokenizer)), "tokenizer_sha256": digest}


class TokenShards(PipelineStep):
    """Writes documents as parquet files of token ids: `SPLIT/SOURCE/TASK-INDEX.parquet`, SPLIT train or heldout.

    One row is one document: its ids, uncut, without special tokens. The files of a task get their names when all of
    them are written; a task that runs again replaces its own.
    """

    type = "WRITER"
    name = "token shards"

    def __init__(self, folder: str, tokenizer: str, heldout_share: float, shard_tokens: int):
        super().__init__()
        self.folder = folder
        self.tokenizer = tokenizer
        self.heldout_share = heldout_share
        self.shard_tokens = shard_tokens

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the executor's tasks are the parallelism
        tokenizer, identity = load_tokenizer(self.tokenizer)
        encoder = tokenizer.backend_tokenizer  # without offsets it is a quarter faster than through transformers
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True  # a "[SEP]" that a text mentions is text: no row holds special tokens
        with ShardFiles(Path(self.folder), rank, self.shard_tokens, identity) as files:
            for batch in _batches(data):
                with self.track_time("batch"):
                    texts = [document.text for document in batch]
                    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
                    for name, rows in self._sorted(batch, [encoding.ids for encoding in encodings]).items():
                        files.write(name, rows)

    def _sorted(self, documents: list[Document], ids: list[list[int]]) -> dict[str, list[list[int]]]:
        """The ids of documents by "SPLIT/SOURCE", counted; a text without tokens (control characters) is no row."""
        rows = defaultdict(list)
        for document, row in zip(documents, ids, strict=True):
            source = document.metadata["source"]
            split = "heldout" if in_heldout_share(document.text, self.heldout_share) else "train"
            self.stat_update(f"{source}|{split if row else 'without_tokens'}")
            if row:
                rows[f"{split}/{source}"].append(row)
        return rows


def _batches(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    """Batches of at most `_BATCH_CHARACTERS`, or one document."""
    batch, characters = [], 0
    for document in documents:
        if batch and characters + len(document.text) > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield batch


class ShardFiles:
    """The parquet files of one task, in a folder of their own until all are whole."""

    def __init__(self, folder: Path, rank: int, shard_tokens: int, identity: dict[str, str]):
        self.folder = folder
        self.rank = rank
        self.shard_tokens = shard_tokens
        self.identity = identity
        self.incomplete = folder / ".incomplete" / f"{rank:05d}"
        self.open: dict[str, tuple[pq.ParquetWriter, Counter]] = {}
        self.indices: Counter = Counter()

    def __enter__(self) -> "ShardFiles":
        shutil.rmtree(self.incomplete, ignore_errors=True)
        for shard in self.folder.glob(f"*/*/{self.rank:05d}-*.parquet"):  # of an earlier, interrupted attempt
            shard.unlink()
        return self

    def __exit__(self, kind: type | None, *_: Any):
        for name in list(self.open):
            self._close(name)
        if kind is None:
            for shard in self.incomplete.glob("*/*/*.parquet"):
                target = self.folder / shard.relative_to(self.incomplete)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(shard, target)
        shutil.rmtree(self.incomplete, ignore_errors=True)

    def write(self, name: str, rows: list[list[int]]):
        """Appends documents to "SPLIT/SOURCE"; a file that has `shard_tokens` is closed, later rows open another."""
        if name not in self.open:
            path = self.incomplete / name / f"{self.rank:05d}-{self.indices[name]:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.open[name] = pq.ParquetWriter(path, SCHEMA, compression="zstd"), Counter()
        writer, counts = self.open[name]
        writer.write_table(pa.table({"input_ids": pa.array(rows, SCHEMA.field("input_ids").type)}, SCHEMA))
        counts.update(documents=len(rows), tokens=sum(map(len, rows)))
        if counts["tokens"] >= self.shard_tokens:
            self._close(name)

    def _close(self, name: str):
        writer, counts = self.open.pop(name)
        self.indices[name] += 1
        writer.add_key_value_metadata(self.identity | {unit: str(count) for unit, count in counts.items()})
        writer.close()
