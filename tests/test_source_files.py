"""Files that cannot be read: one line that names the source and the file, before training, whatever reads them.

Laws: every stage says the same of the same file; a .zst file that was cut off is never taken for a shorter one, even
where its rest ends with a line; files of several frames are whole.
"""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import GOLDEN, REPOSITORY, SHIPPED

from training import distillation, finetune, mlm, pairs
from training.corpus_recipe import _check_source as check_corpus_source
from training.document_pairs import DocumentPairsRecipe, write_pairs
from training.mining_recipe import MiningRecipe, Retriever
from training.mining_recipe import check as check_mining
from training.pair_recipe import PairRecipe
from training.pair_recipe import check as check_pairs
from training.pair_sources import load_sources
from training.recipe import ContrastiveRecipe, MLMRecipe, RecipeError, Source
from training.run import exit_on_recipe_error
from training.source_files import check_files, open_source, source_files
from training.sources import open_sources, sequences

RECIPES = REPOSITORY / "training" / "recipes"
LINES = [json.dumps({"query": f"Question {i}?", "positive": f"Answer {i}."}) + "\n" for i in range(40_000)]
TEXT = "".join(LINES).encode()


def flushed(lines: list[str]) -> bytes:
    """zstd of lines, cut off where the first half of them ends; what is left decodes to whole lines."""
    compressor = zstandard.ZstdCompressor().compressobj()
    half = compressor.compress("".join(lines[: len(lines) // 2]).encode())
    return half + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def write(root, name: str):
    compressed = zstandard.compress(TEXT)
    contents = {
        "header.csv": b"query,positive\n",
        "blank.jsonl": b"\n\n\n",
        "cut.jsonl.zst": compressed[: len(compressed) // 2],
        "header.jsonl.zst": compressed[:5],
        "line.jsonl.zst": flushed(LINES[:1000]),
        "not.jsonl.zst": TEXT[:1000],
        "tail.jsonl.zst": compressed + b"junk",
        "cut.jsonl.gz": gzip.compress(TEXT)[:2000],
        "not.jsonl.gz": TEXT[:1000],
        "bad.jsonl": b'{"query": "a", "positive": "b"}\n{"query": "c", "posi\n',
        "latin.csv": "query,positive\nä,ö\n".encode("latin-1"),
        "ragged.csv": b"query,positive\na,b\na,b,c\n",
        "cut.parquet": b"PAR1 and no more",
        "numbers.jsonl": b'{"query": 3, "positive": 4}\n',
        "lists.jsonl": b'{"query": ["a"], "positive": ["b"]}\n',
        "empty.jsonl": b"",
    }
    if name == "zero.parquet":
        parquet(root / name, query=pa.array([], pa.string()), positive=pa.array([], pa.string()))
    elif name == "numbers.parquet":
        parquet(root / name, query=[1, 2], positive=[3, 4])
    else:
        (root / name).write_bytes(contents[name])


BAD = {
    "header.csv": "no rows in header.csv",
    "zero.parquet": "zero.parquet: it has no rows",
    "blank.jsonl": "no rows in blank.jsonl",
    "empty.jsonl": "empty.jsonl is empty",
    "cut.jsonl.zst": "cut.jsonl.zst: it ends in the middle of a zstd frame",
    "header.jsonl.zst": "header.jsonl.zst: it ends in the middle of a zstd frame",
    "line.jsonl.zst": "line.jsonl.zst: it ends in the middle of a zstd frame",
    "not.jsonl.zst": "not.jsonl.zst: no zstd frame at byte 0",
    "tail.jsonl.zst": "tail.jsonl.zst: no zstd frame at byte",
    "cut.jsonl.gz": "cut.jsonl.gz: EOFError",
    "not.jsonl.gz": "not.jsonl.gz: BadGzipFile",
    "bad.jsonl": "bad.jsonl: ArrowInvalid: JSON parse error",
    "latin.csv": "latin.csv: UnicodeDecodeError",
    "ragged.csv": "ragged.csv: ParserError",
    "cut.parquet": "cut.parquet: ArrowInvalid: Parquet magic bytes",
    "numbers.jsonl": "not a text|not text",
    "numbers.parquet": "not a text|not text",
    "lists.jsonl": "not a text|not text",
}


def stage_one(source, root, tokenizer):
    recipe = MLMRecipe(data_dir=str(root), sources=[source])
    list(sequences(recipe, recipe.sources, tokenizer))


def stage_two(source, root, tokenizer):
    load_sources(ContrastiveRecipe(data_dir=str(root), sources=[source]))


def stage_three(source, root, tokenizer):
    load_sources(ContrastiveRecipe(data_dir=str(root), sources=[source], num_negatives=2, fill_negatives="random"))


def mining(source, root, tokenizer):
    recipe = MiningRecipe(output_dir=str(root / "out"), data_dir=str(root), sources=[source], num_negatives=1)
    recipe.retrievers = [Retriever(name="words", model="bm25")]
    check_mining(recipe)


def preparation(source, root, tokenizer):
    check_pairs(PairRecipe(output_dir=str(root / "out"), data_dir=str(root), sources=[source]))


def corpus(source, root, tokenizer):
    check_corpus_source(source, str(root))


def document_pairs(source, root, tokenizer):
    write_pairs(DocumentPairsRecipe(output_dir=str(root / "out"), data_dir=str(root), sources=[source]))


READERS = [stage_one, stage_two, stage_three, mining, preparation, corpus, document_pairs]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named(tmp_path, tokenizer, name, reader):
    write(tmp_path, name)
    with pytest.raises(RecipeError, match=BAD[name]) as error:
        reader(Source(name="mine", path=name, text="query", negatives=None), tmp_path, tokenizer)
    assert str(error.value).startswith("source mine: ")
    assert "\n" not in str(error.value)


def test_the_damaged_file_of_many_is_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(TEXT[: TEXT.index(b"\n") + 1]))
    (tmp_path / "b.jsonl.zst").write_bytes(flushed(LINES[:1000]))
    with pytest.raises(RecipeError, match=r"source mine: cannot be read: .*/b\.jsonl\.zst: it ends in the middle"):
        check_files(Source(name="mine", path="*.jsonl.zst"), str(tmp_path))


@pytest.mark.parametrize("checksum", [False, True])
def test_every_cut_is_found_and_no_whole_file_refused(tmp_path, checksum):
    """Frames of one block, of many, of repeated bytes, empty ones, one without its size, a skippable one."""
    compressor = zstandard.ZstdCompressor(write_checksum=checksum)
    stream = compressor.compressobj()
    skippable = b"\x53\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    parts = [compressor.compress(b"\n" * 300_000), compressor.compress(b""), skippable, compressor.compress(TEXT[:50])]
    parts.append(stream.compress(TEXT[:200_000]) + stream.flush())
    path, source = tmp_path / "many.jsonl.zst", Source(name="mine", path="many.jsonl.zst")
    whole = b"".join(parts)
    path.write_bytes(whole)
    check_files(source, str(tmp_path))
    ends = {sum(map(len, parts[: i + 1])) for i in range(len(parts))}
    for length in {*range(1, 60), *range(60, len(whole), 97), len(whole) - 1} - ends:
        path.write_bytes(whole[:length])
        with pytest.raises(RecipeError, match="it ends in the middle"):
            check_files(source, str(tmp_path))


@pytest.mark.parametrize("streaming", [True, False])
def test_files_of_several_frames_are_read_whole(tmp_path, streaming):
    half = TEXT.index(b"\n", len(TEXT) // 2) + 1
    (tmp_path / "two.jsonl.zst").write_bytes(zstandard.compress(TEXT[:half]) + zstandard.compress(TEXT[half:]))
    rows = open_source(Source(name="mine", path="two.jsonl.zst"), str(tmp_path), streaming=streaming)
    assert sum(1 for _ in rows) == len(LINES)


def test_what_is_met_in_the_middle_of_stage_one_is_named(tmp_path, tokenizer):
    rows = [json.dumps({"text": f"A sentence of row {i}."}) + "\n" for i in range(300)]
    recipe = MLMRecipe(data_dir=str(tmp_path), sources=[Source(name="mine", path="*.jsonl")])
    (tmp_path / "0.jsonl").write_text("".join(rows))
    for row, message in (('{"text": ["list"]}\n', "not text|cast"), ('{"text": "cu\n', "jsonl: ArrowInvalid")):
        (tmp_path / "1.jsonl").write_text(row)
        open_sources(recipe, recipe.sources, tokenizer)  # not met yet
        with pytest.raises(RecipeError, match=f"source mine: .*({message})"):
            list(sequences(recipe, recipe.sources, tokenizer))


STAGES = {
    mlm: ("tiny-mlm", [f"tokenizer={SHIPPED}", "heldout=[]"]),
    pairs: ("tiny-pairs", [f"model={SHIPPED}"]),
    distillation: ("tiny-distillation", [f"model={SHIPPED}", f"teacher={SHIPPED}"]),
    finetune: ("finetune", [f"model={GOLDEN / 'A-small4h'}"]),
}


@pytest.mark.parametrize("module", STAGES, ids=lambda module: module.__name__)
def test_every_command_ends_with_one_line_and_status_two(tmp_path, monkeypatch, capsys, module):
    write(tmp_path, "line.jsonl.zst")
    recipe, overrides = STAGES[module]
    data = "data=line.jsonl.zst" if module is finetune else "sources=[{name: mine, path: line.jsonl.zst, text: query}]"
    fixed = [data, f"data_dir={tmp_path}", f"output_dir={tmp_path / 'run'}", "training.use_cpu=true"]
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(RECIPES / f"{recipe}.yaml"), *fixed, *overrides])
    with pytest.raises(SystemExit) as ended:
        exit_on_recipe_error(module.main)
    assert ended.value.code == 2
    name = "data" if module is finetune else "mine"
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    path = tmp_path / "line.jsonl.zst"
    assert errors == [f"error: source {name}: cannot be read: {path}: it ends in the middle of a zstd frame."]


def test_a_source_is_a_file_of_that_name_or_a_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "data [1]"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl", "a[b].jsonl"):
        (folder / name).write_text("".join(LINES[:3]))
    monkeypatch.setenv("HOME", str(folder))

    def names(path: str, data_dir: str) -> list[str]:
        return [file.name for file in source_files(Source(name="x", path=path), data_dir)]

    assert names("*.jsonl", str(folder)) == ["a.jsonl", "a[b].jsonl", "b.jsonl"]
    assert names("a[b].jsonl", str(folder)) == ["a[b].jsonl"]  # as a pattern it would be ab.jsonl
    assert names("~/b.jsonl", "nowhere") == ["b.jsonl"]
    assert names(str(tmp_path / "*" / "?.jsonl"), "nowhere") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(RecipeError, match="no file matches /nowhere/"):
        names("/nowhere/*.jsonl", str(folder))
