"""A job: a corpus, a model and a folder of parts; what its workers and its driver do, on whatever engine.

Law: an engine may run a part twice or on two machines at once, and kill any process at any time: the folder then holds
each row of the corpus once. The driver checks that from the files before it writes `_manifest.json`, so a folder with
that file is complete. `_job.json` keeps two jobs from sharing a folder.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ..embedding.model_folder import Encoding, ModelFolder, load_model
from ..embedding.text_input import InputError
from ..embedding.vector_files import Layout
from ..hub.snapshot import fetch
from . import parquet_parts as pp
from .parquet_parts import Made, Part, Source

JOB, MANIFEST = "_job.json", "_manifest.json"
FORMAT = 1
"""Of the parts; another number is another job."""


class JobError(ValueError):
    """An output that cannot be gone on with; the message is one line that names the way out."""


@dataclass(frozen=True)
class Settings:
    """What the rows of the output depend on besides the corpus.

    Attributes:
        model: Folder, or name of a Hub repository.
        encoding: How texts are embedded.
        column: Of the texts.
        dtype: Of the stored vectors, "float32" or "float16".
        keep_text: Whether the column of the texts goes into the output.
        lenient: See `parquet_parts.texts`.
        part_rows: Rows of a part at most.
    """

    model: str
    encoding: Encoding
    column: str = "text"
    dtype: str = "float32"
    keep_text: bool = True
    lenient: bool = False
    part_rows: int = pp.PART_ROWS


@dataclass(frozen=True)
class Job:
    """All that a worker needs; it can be pickled.

    Attributes:
        settings: See there.
        sources: Files of the corpus.
        parts: Of the output.
        filesystem: Of the output.
        folder: Of the output.
        model_sha256: Of weights and tokenizer.
        model_folder: Where the driver found the model, absolute; None for a Hub repository.
        fingerprint: Of the description.
    """

    settings: Settings
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]
    filesystem: pafs.FileSystem
    folder: str
    model_sha256: str
    model_folder: str | None
    fingerprint: str

    @property
    def rows(self) -> int:
        """Of the corpus."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Outcome:
    """What a worker did with a part.

    Attributes:
        part: Its number.
        rows: Of it.
        before: Whether its file was there already.
        pid: Of the process.
        error: What is wrong with the input or the model, in one line; "" if nothing.
    """

    part: int
    rows: int
    before: bool
    pid: int
    error: str = ""


def plan(names: list[str], output: str, settings: Settings, *, id_column: str | None = None) -> tuple[Job, dict]:
    """The job, and its description as JSON can hold it.

    Args:
        names: Files and folders of the corpus.
        output: Folder, or its URI.
        settings: See there.
        id_column: A column that must not hold a value twice; None for none.

    Raises:
        ValueError: A corpus that cannot be read, or a model that cannot be had.
    """
    sources = pp.find_sources(names, output)
    pp.check_columns(sources[0], settings.column, id_column)
    if id_column == settings.column and not settings.keep_text:
        raise InputError(f"column {id_column!r} is the id and the text, which is not kept: keep it, or name another.")
    if id_column is not None:
        doubled = pp.doubled_value([(source.filesystem, source.path) for source in sources], id_column)
        if doubled is not None:
            raise InputError(f"column {id_column!r} holds {doubled[0]!r} {doubled[1]} times.")
    # The driver may have no GPU: it reads the folder, and the workers load the model.
    model = ModelFolder(settings.model, replace(settings.encoding, device="cpu"))
    description = {
        "format": FORMAT,
        **model.job(),
        "device": settings.encoding.device,
        **{name: value for name, value in asdict(settings).items() if name not in ("model", "encoding")},
        "files": [[source.path, source.size, list(source.groups)] for source in sources],
    }
    description = json.loads(json.dumps(description))
    filesystem, folder = pp.locate(output)
    parts = pp.cut((source.groups for source in sources), settings.part_rows)
    local = str(Path(settings.model).absolute()) if Path(settings.model).is_dir() else None
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    job = Job(settings, tuple(sources), tuple(parts), filesystem, folder, model.sha256, local, fingerprint)
    return job, description


class PartEmbedder:
    """Makes the files of parts; the model is loaded for the first one that is not there.

    Args:
        job: See there.
    """

    def __init__(self, job: Job):
        self.job = job
        self._reader = pp.PartReader(job.sources)

    @cached_property
    def _embed(self) -> tuple[Callable, Layout]:
        job = self.job
        # A relative folder may have been copied to where this worker runs; else it is where the driver found it.
        name = job.settings.model if Path(job.settings.model).is_dir() else job.model_folder or job.settings.model
        model = ModelFolder(name, job.settings.encoding)
        if model.sha256 != job.model_sha256:
            raise InputError(f"{name} is another model here than where the job was started.")
        layout = Layout((), model.dimensions, job.settings.dtype)
        return model.embedder(layout), layout

    def make(self, number: int) -> Outcome:
        """Writes the file of a part, unless it is there.

        Args:
            number: Of the part.

        Returns:
            What was done. An error in the input or the model is told, not raised: another try would not mend it.
        """
        part = self.job.parts[number]
        try:
            before = self._make(part)
        except (ValueError, ImportError) as error:
            return Outcome(number, 0, False, os.getpid(), pp.one_line(error))
        return Outcome(number, part.rows, before, os.getpid())

    def _make(self, part: Part) -> bool:
        job = self.job
        made = Made(job.fingerprint, asdict(part), self._reader.digest(part))
        found = pp.read_made(job.filesystem, f"{job.folder}/{part.name}")
        if found is not None and _identity(found) == _identity(made):
            return True
        embed, layout = self._embed
        table = self._reader.rows(part)
        path, column = job.sources[part.source].path, job.settings.column
        rows, lenient = pp.texts(table, column, part=part, path=path, lenient=job.settings.lenient)
        result = embed(rows)
        field = layout.schema().field(pp.EMBEDDING)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(result.embeddings.vectors.ravel()), type=field.type)
        table = (table if job.settings.keep_text else table.drop_columns([column])).append_column(field, vectors)
        made = replace(made, cut_texts=result.cut_texts, cut_tokens=result.cut_tokens, lenient_texts=lenient)
        pp.write_part(job.filesystem, job.folder, part=part, table=table, made=made)
        return False


@cache
def loaded_model(name: str, device: str = "cpu"):
    """The model, loaded once in a process: for engines that call a function, as Spark's `mapInArrow` does.

    Args:
        name: Folder or Hub repository.
        device: As "cpu" or "cuda".
    """
    return load_model(fetch(name), device, None)


def _identity(made: Made) -> tuple:
    return made.job, made.part, made.digest


def open_output(job: Job, description: dict, *, overwrite: bool = False):
    """Makes the folder, or checks that its parts are of this job.

    Args:
        job: See `plan`.
        description: See `plan`.
        overwrite: Drop the parts of whatever job; a folder without a job is left alone.

    Raises:
        JobError: The folder holds parts of another job, or something else.
    """
    filesystem, folder = job.filesystem, job.folder
    info = filesystem.get_file_info(folder)
    if info.type == pafs.FileType.File:
        raise JobError(f"{folder} is a file: name a folder.")
    filesystem.create_dir(folder, recursive=True)
    names = _names(job)
    before = _read_json(job, JOB) if JOB in names else None
    if before is None and any(not name.startswith(".") for name in names):
        raise JobError(f"{folder} is not empty and holds no job: name another folder.")
    if before is not None and before != description and not overwrite:
        name = next(x for x in sorted(before.keys() | description.keys()) if before.get(x) != description.get(x))
        old, new = (repr(x.get(name))[:80] for x in (before, description))
        raise JobError(
            f"{folder} holds parts of another job: {name} was {old}, is {new}. Name another folder, or --overwrite."
        )
    for name in names:
        # The manifest goes first in any case: until the end nothing is known to be complete.
        if name == MANIFEST or (overwrite and (name == JOB or _is_part(name))):
            filesystem.delete_file(f"{folder}/{name}")
    _write_json(job, JOB, description)


def finish(job: Job, description: dict, *, id_column: str | None = None) -> dict[str, Any]:
    """Checks the folder from its files alone, writes the manifest and removes what killed workers left.

    Args:
        job: See `plan`.
        description: See `plan`.
        id_column: See `plan`.

    Returns:
        The manifest.

    Raises:
        RuntimeError: The folder does not hold every row of the corpus once.
    """
    names = _names(job)
    there = sorted(name for name in names if _is_part(name) and not name.startswith("."))
    if there != sorted(part.name for part in job.parts):
        odd = sorted(set(there) ^ {part.name for part in job.parts})
        raise RuntimeError(f"{job.folder}: {odd[0]} is {'not of this job' if odd[0] in there else 'missing'}.")
    paths = [f"{job.folder}/{part.name}" for part in job.parts]
    made = pp.read_all_made(job.filesystem, paths)
    for part, of_part in zip(job.parts, made, strict=True):
        if of_part is None or (of_part.job, of_part.part) != (job.fingerprint, asdict(part)):
            raise RuntimeError(f"{job.folder}/{part.name} is damaged or not of this job.")
    if id_column is not None:
        doubled = pp.doubled_value([(job.filesystem, path) for path in paths], id_column)
        if doubled is not None:
            raise RuntimeError(f"{job.folder}: column {id_column!r} holds {doubled[0]!r} {doubled[1]} times.")
    found = [of_part for of_part in made if of_part is not None]
    manifest = {
        "job": job.fingerprint,
        "rows": sum(of_part.part["rows"] for of_part in found),
        "distinct_ids_of": id_column,
        **{name: sum(getattr(x, name) for x in found) for name in ("cut_texts", "cut_tokens", "lenient_texts")},
        "description": description,
        "parts": [{"name": part.name, **x.part, "digest": x.digest} for part, x in zip(job.parts, found, strict=True)],
    }
    _write_json(job, MANIFEST, manifest)
    for name in names:
        if name.startswith(".") and _is_part(name):
            job.filesystem.delete_file(f"{job.folder}/{name}")
    return manifest


def _is_part(name: str) -> bool:
    """Whether a file is of ours: a part, or what a killed worker left of one."""
    return name.startswith(("part-", ".part-")) and ".parquet" in name


def _names(job: Job) -> list[str]:
    found = job.filesystem.get_file_info(pafs.FileSelector(job.folder))
    return sorted(info.base_name for info in found)


def _read_json(job: Job, name: str) -> dict[str, Any]:
    with job.filesystem.open_input_stream(f"{job.folder}/{name}") as file:
        try:
            return json.loads(file.read())
        except ValueError:
            raise JobError(f"{job.folder}/{name} is damaged: name another folder.") from None


def _write_json(job: Job, name: str, content: dict):
    unfinished = f"{job.folder}/.{name}.{os.getpid()}"
    with job.filesystem.open_output_stream(unfinished) as file:
        file.write(json.dumps(content, indent=1).encode())
    job.filesystem.move(unfinished, f"{job.folder}/{name}")
