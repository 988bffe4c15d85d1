"""The steps of pair preparation before the teacher: reading, empty and identical pairs, duplicates, language, files.

Laws: what a step removes is counted, and never silently skipped. Which copy of a pair stays is decided by the copies
alone (the source named first, then a hash of the text as it stands), never by the order in which they were read. A
file of pairs that carries its final name is whole.
COST: signatures take 26 bytes a pair on disk and about 100 in memory, one bucket at a time.
NOTE: datatrove's ExactDedup is not used: it orders copies by 16 bits of priority, then by their place.
"""

import functools
import hashlib
import os
import re
import shutil
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS

from .corpus_steps import Removed, share, tally, windows
from .mining_texts import normalised, replacing
from .pair_recipe import PairLanguage
from .recipe import Source
from .source_files import open_source, readable, text_of

SCHEMA = pa.schema([("query", pa.string()), ("positive", pa.string())])
_ROWS = 2000  # of a row group, held in memory for each source
_EXAMPLE_CHARACTERS = 190  # of each text
_SIGNATURE = np.dtype([("key", "<u8"), ("source", "<u2"), ("text", "<u8"), ("row", "<u8")])


def pair_document(source: str, place: str, query: str, positive: str) -> Document:
    """A pair as a document: its text is both, on two lines, so that datatrove's and our steps see both."""
    metadata = {"source": source, "query_characters": len(query)}
    return Document(text=f"{query}\n{positive}", id=f"{source}/{place}", metadata=metadata)


def pair_of(document: Document) -> tuple[str, str]:
    """The query and the positive of a document."""
    end = document.metadata["query_characters"]
    return document.text[:end], document.text[end + 1 :]


def hash_of(text: str, *, seed: int = 0) -> int:
    """64 bits of BLAKE2b; among 1.6 billion texts two share a hash with probability 0.07."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")


def pair_key(query: str, positive: str) -> str:
    """What two copies of a pair share, whatever their case and whitespace.

    >>> pair_key("What is\\n RNA?", "An acid.") == pair_key("what is rna?", " An  Acid.")
    True
    """
    return f"{normalised(query)}\n{normalised(positive)}"


def save_array(path: Path, rows: np.ndarray):
    """Writes an array that is whole or not there."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, rows)


class PairReader(PipelineStep):
    """The rows of a source as documents, read as stage II reads them; null is an empty text."""

    type = "READER"

    def __init__(self, source: Source, data_dir: str):
        self.name = source.name
        super().__init__()
        self.source = source
        self.data_dir = data_dir

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from data or ()
        source, columns = self.source, (self.source.anchor, self.source.positive)
        rows = open_source(source, self.data_dir, streaming=True).select_columns(list(columns))
        for index, row in readable(source, share(rows, rank, world_size)):
            query, positive = (text_of(row[column], source, column, index) for column in columns)
            document = pair_document(self.name, f"{rank:05d}/{index}", query, positive)
            tally(self, self.name, document.text)
            yield document


class RemovedPairs(Removed):
    """Writes removed pairs: all of them whole, or the first of each source and reason with both texts cut short."""

    def write(self, document: Document, rank: int = 0, **kwargs: Any):
        if self.limit is not None:
            query, positive = (text[:_EXAMPLE_CHARACTERS] for text in pair_of(document))
            metadata = {**document.metadata, "query_characters": len(query)}
            document = replace(document, text=f"{query}\n{positive}", metadata=metadata)
        super().write(document, rank, **kwargs)


class PairRule(BaseFilter):
    """Keeps the pairs for which a function of their two texts is true; it has to be importable by the tasks."""

    type = "FILTER"

    def __init__(self, name: str, keeps: Callable[[str, str], bool], exclusion_writer: Removed | None = None):
        self.name = name
        super().__init__(exclusion_writer)
        self.keeps = keeps

    def filter(self, doc: Document) -> bool:
        return self.keeps(*pair_of(doc))


def is_filled(query: str, positive: str) -> bool:
    """Whether both are more than whitespace."""
    return bool(query.strip() and positive.strip())


def is_different(query: str, positive: str) -> bool:
    """Whether the two differ by more than case and whitespace."""
    return normalised(query) != normalised(positive)


class Signatures(PipelineStep):
    """Lets pairs pass and writes what finds their copies: BUCKET/TASK.npy."""

    type = "DEDUP"
    name = "signatures"

    def __init__(self, folder: str, sources: list[str], buckets: int):
        super().__init__()
        self.folder = folder
        self.order = {source: index for index, source in enumerate(sources)}
        self.buckets = buckets

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        keys, sources, texts = array("Q"), array("H"), array("Q")
        for document in data:
            keys.append(hash_of(pair_key(*pair_of(document))))
            sources.append(self.order[document.metadata["source"]])
            texts.append(hash_of(document.text))
            yield document
        signatures = np.empty(len(keys), _SIGNATURE)
        for name, values in (("key", keys), ("source", sources), ("text", texts), ("row", range(len(keys)))):
            signatures[name] = values
        buckets = signatures["key"] % self.buckets
        for bucket in range(self.buckets):
            save_array(Path(self.folder) / f"{bucket:05d}" / f"{rank:05d}.npy", signatures[buckets == bucket])


class FindDuplicates(PipelineStep):
    """Of the copies of a pair in a bucket all but the first: BUCKET/TASK.npy, rows of the task that read them."""

    type = "DEDUP"
    name = "find duplicates"

    def __init__(self, signatures: str, folder: str):
        super().__init__()
        self.signatures = signatures
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        files = sorted((Path(self.signatures) / f"{rank:05d}").glob("*.npy"))
        parts = [np.load(file) for file in files]
        task = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        later = copies(np.concatenate(parts), task)
        for number, (file, part) in enumerate(zip(files, parts, strict=True)):
            save_array(Path(self.folder) / f"{rank:05d}" / file.name, part["row"][later[task == number]])


def copies(signatures: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Which pairs are copies of one that comes before them in the order of source, text, task and row.

    Args:
        signatures: `(pairs,)` of `_SIGNATURE`.
        task: `(pairs,) int`, the task that read each; with the row it decides between copies that are equal.

    Returns:
        `(pairs,) bool`.
    """
    order = np.lexsort((signatures["row"], task, signatures["text"], signatures["source"], signatures["key"]))
    keys = signatures["key"][order]
    later = np.zeros(len(keys), bool)
    later[order[1:]] = keys[1:] == keys[:-1]
    return later


class DuplicateFilter(BaseFilter):
    """Removes the rows that `FindDuplicates` named; it has to see the pairs in the order `Signatures` saw them."""

    type = "FILTER"
    name = "duplicate"

    def __init__(self, folder: str, exclusion_writer: Removed | None = None):
        super().__init__(exclusion_writer)
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        files = sorted(Path(self.folder).glob(f"*/{rank:05d}.npy"))
        rows = np.sort(np.concatenate([np.empty(0, np.uint64), *map(np.load, files)]))
        self.rows = rows
        self.next, self.row = 0, -1
        yield from super().run(data, rank, world_size)
        if self.next < len(rows):
            raise RuntimeError(f"{len(rows) - self.next} duplicates of task {rank} were not among its pairs.")

    def filter(self, doc: Document) -> bool:
        self.row += 1
        if self.next < len(self.rows) and self.rows[self.next] == self.row:
            self.next += 1
            return False
        return True


class PairLanguageFilter(BaseFilter):
    """Removes pairs that lingua is sure are in another language; its models lie in its wheel, nothing is downloaded.

    The two texts are judged as one. English by its stop words is kept without asking lingua, which saves nine tenths
    of its time on long texts.
    """

    type = "FILTER"
    name = "language"

    def __init__(self, language: PairLanguage, exclusion_writer: Removed | None = None):
        super().__init__(exclusion_writer)
        self.language = language

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Kept unless a language that is not in `keep` has at least `sure` of the confidence; it is the reason."""
        language = self.language
        if "en" in language.keep and has_stop_words(doc.text):
            return True
        code, confidence = likeliest_other(windows(doc.text, language.characters), language)
        return True if confidence < language.sure else (False, code)


_STOP_WORDS = frozenset(STOP_WORDS)
_WORD = re.compile(r"[^\W\d_]+")


def has_stop_words(text: str) -> bool:
    """Whether two different English stop words (Gopher's eight) occur and make 8 % of the words.

    In running English they make 15 %. Of 2,400 pairs of messages in 16 other languages, English names of commands and
    options among them, none passes.

    >>> has_stop_words("a family of fungi and the lichens"), has_stop_words("Verzeichnis of the Datei")
    (True, True)
    >>> has_stop_words("Gastrocybe: a genus of fungi")
    False
    """
    words = _WORD.findall(text.lower())
    found = [word for word in words if word in _STOP_WORDS]
    return len(set(found)) >= 2 and len(found) >= 0.08 * len(words)


def likeliest_other(text: str, language: PairLanguage) -> tuple[str, float]:
    """The likeliest language that is not to be kept, and lingua's confidence in it, 0 to 1."""
    keep = {code.lower() for code in language.keep}
    values = _detector(tuple(language.among) if language.among else None).compute_language_confidence_values(text)
    codes = ((value.language.iso_code_639_1.name.lower(), value.value) for value in values)
    return max((item for item in codes if item[0] not in keep), key=lambda item: item[1])


@functools.cache
def _detector(among: tuple[str, ...] | None) -> Any:
    """High accuracy: trigrams alone, enough for a document, take a tenth of the shortest pairs for another language.

    Latin is not among the spoken languages: glossaries of anatomy and botany would be taken for it.
    """
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    if among is None:
        return LanguageDetectorBuilder.from_all_spoken_languages().build()
    codes = [getattr(IsoCode639_1, code.upper()) for code in among]
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()


class PairFiles(PipelineStep):
    """Writes pairs as SOURCE/TASK.parquet, columns `query` and `positive`.

    The files of a task get their names when all of them are written; a task that runs again replaces its own.
    """

    type = "WRITER"

    def __init__(self, folder: str):
        self.name = Path(folder).name
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1):
        incomplete = self.folder / ".incomplete" / f"{rank:05d}"
        shutil.rmtree(incomplete, ignore_errors=True)
        for file in self.folder.glob(f"*/{rank:05d}.parquet"):  # of an earlier, interrupted attempt
            file.unlink()
        writers: dict[str, pq.ParquetWriter] = {}
        pending: dict[str, list[dict[str, str]]] = defaultdict(list)

        def flush(source: str):
            if source not in writers:
                incomplete.mkdir(parents=True, exist_ok=True)
                writers[source] = pq.ParquetWriter(incomplete / f"{source}.parquet", SCHEMA, compression="zstd")
            writers[source].write_table(pa.Table.from_pylist(pending.pop(source), SCHEMA))

        for document in data:
            source = document.metadata["source"]
            pending[source].append(dict(zip(SCHEMA.names, pair_of(document), strict=True)))
            if len(pending[source]) == _ROWS:
                flush(source)
        for source in list(pending):
            flush(source)
        for source, writer in writers.items():
            writer.close()
            (self.folder / source).mkdir(parents=True, exist_ok=True)
            os.replace(incomplete / f"{source}.parquet", self.folder / source / f"{rank:05d}.parquet")
        shutil.rmtree(incomplete, ignore_errors=True)


class StoredPairs(PipelineStep):
    """The pairs that the same task of an earlier stage wrote, source by source, in order."""

    type = "READER"
    name = "stored pairs"

    def __init__(self, folder: str, sources: list[str]):
        super().__init__()
        self.folder = folder
        self.sources = sources

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for source in self.sources:
            file = Path(self.folder) / source / f"{rank:05d}.parquet"
            if file.is_file():
                for index, (query, positive) in enumerate(_rows(file)):
                    yield pair_document(source, f"{rank:05d}/{index}", query, positive)


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    with pq.ParquetFile(file) as stored:
        for batch in stored.iter_batches(_ROWS):
            yield from zip(*(batch.column(name).to_pylist() for name in SCHEMA.names), strict=True)
