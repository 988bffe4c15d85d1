"""The data of stage I: every document exactly once, in an order that only the seed and the number of readers decide,
from any place on, with what is lost counted.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY, SHIPPED
from hub_server import serve

from modeling_jina_bert.masking import IGNORED
from training.masking import WholeWordMaskingCollator
from training.packing import Progress, Reader, Tally, TrainingBatches, data_loader, load_progress, save_progress
from training.recipe import MLMRecipe, RecipeError, Source
from training.sources import Cutter, SourceReader, is_heldout, open_sources, open_tokenizer, sequences
from training.stream import SequenceStream


def write(path: Path, first: int, count: int, words: int = 5) -> str:
    """Documents that begin with their number; every third one is four times as long, every tenth is blank."""
    lengths = [words * (4 if number % 3 == 0 else 1) for number in range(first, first + count)]
    texts = [
        " " if number % 10 == 9 else " ".join([str(number), *["word"] * length])
        for number, length in zip(range(first, first + count), lengths, strict=True)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path.name


@pytest.fixture
def corpus(tmp_path):
    """Three files of 23 documents (0 to 68), and one of 40 (1000 to 1039)."""
    for part in range(3):
        write(tmp_path / f"part-{part}.jsonl", 23 * part, 23)
    write(tmp_path / "single.jsonl", 1000, 40)
    return tmp_path


SOURCES = [Source(name="parts", path="part-*.jsonl", weight=3.0), Source(name="single", path="single.jsonl")]


def recipe(folder, **changes) -> MLMRecipe:
    settings = {"max_length": 12, "long_documents": "split", "shuffle_buffer": 7, "training": {"seed": 5}}
    return MLMRecipe(data_dir=str(folder), sources=SOURCES, **{**settings, **changes})


def stream(of: MLMRecipe, tokenizer, **share) -> SequenceStream:
    return SequenceStream(open_sources(of, of.sources, tokenizer), of, tokenizer, **share)


def take(iterable, count: int) -> list[tuple]:
    return [(s["input_ids"].tolist(), s["source"], s["visit"], s["lost"]) for s in itertools.islice(iterable, count)]


@pytest.mark.parametrize(("form", "buffer"), [("split", 7), ("cut", 1), ("pack", 16)])
def test_a_stream_goes_on_from_any_place(corpus, tokenizer, form, buffer):
    """Three epochs and several fillings, with sources of which one begins again before the other has ended."""
    whole = recipe(corpus, long_documents=form, shuffle_buffer=buffer)
    running = stream(whole, tokenizer, consumer=1, consumers=2)
    expected, places = [], [running.position()]
    for sequence in itertools.islice(running, 300):
        expected += take([sequence], 1)
        places.append(json.loads(json.dumps(running.position())))
    assert places[-1]["epoch"] >= 2
    assert max(visit for _, _, visit, _ in expected) >= 3
    for done in [*range(40), 99, 150, 222, 295]:
        again = stream(whole, tokenizer, consumer=1, consumers=2, position=places[done])
        assert take(again, 5) == expected[done : done + 5], done


def test_going_on_reads_the_buffer_again_and_not_the_corpus(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "part-0.jsonl", 0, 3000)
    long = recipe(tmp_path, long_documents="cut", shuffle_buffer=20)
    long.sources = SOURCES[:1]
    running = stream(long, tokenizer)
    expected = take(running, 2000)
    place = running.position()
    expected = take(running, 5)
    read = []
    texts = Cutter.texts
    monkeypatch.setattr(Cutter, "texts", lambda self, batch: read.extend(batch) or texts(self, batch))
    assert take(stream(long, tokenizer, position=place), 5) == expected
    assert 20 <= len(read) < 300


def test_the_order_of_one_reader_is_that_of_datasets(corpus, tokenizer):
    """Golden: datasets 5.2.0, interleave_datasets([first, single], [0.75, 0.25], 5, "all_exhausted").shuffle(5, 7).

    The published runs were ordered by it.
    """
    write(corpus / "first.jsonl", 0, 60)
    of = recipe(corpus, long_documents="cut")
    of.sources = [Source(name="first", path="first.jsonl", weight=3.0), SOURCES[1]]
    found = [sequence["input_ids"].tolist() for sequence in itertools.islice(stream(of, tokenizer), 24)]
    assert numbers(found, tokenizer) == [
        1001, 2, 0, 1, 4, 3, 5, 7, 1004, 1002, 8, 1000, 10, 1003, 11, 1005, 14, 16, 15, 12, 6, 1006, 13, 20,
    ]  # fmt: skip


def numbers(rows, tokenizer) -> list[int]:
    """The numbers of the documents of rows of token ids; a number is one or several pieces before the first word."""
    word = tokenizer.convert_tokens_to_ids("word")
    return [
        int(tokenizer.decode(list(itertools.takewhile(lambda i: i != word, ids[1:-1]))).replace(" ", ""))
        for ids in rows
    ]


TEXTS = {number for number in [*range(69), *range(1000, 1040)] if number % 10 != 9}


@pytest.mark.parametrize("consumers", [1, 2, 3, 4, 7])
def test_one_pass_of_all_readers_is_every_document_once(corpus, tokenizer, consumers):
    cut = recipe(corpus, long_documents="cut")
    cutter = Cutter(cut, tokenizer)
    found = []
    for consumer in range(consumers):
        for opened in open_sources(cut, cut.sources, tokenizer):
            reader = SourceReader(opened, cutter, consumer=consumer, consumers=consumers)
            rows = [sequence["input_ids"].tolist() for sequence in reader.one_pass()]
            assert rows, "a reader without documents"
            assert [s["input_ids"].tolist() for s in reader.one_pass()] == rows  # the second pass is the first
            found += numbers(rows, tokenizer)
    assert sorted(found) == sorted(TEXTS)


def batches_of(of: MLMRecipe, tokenizer, size: int, reader: Reader, progress: Progress | None = None):
    collator = WholeWordMaskingCollator(tokenizer, seed=3)
    return TrainingBatches(open_sources(of, of.sources, tokenizer), of, collator, size, reader, progress)


class LoaderArguments:
    dataloader_pin_memory = False
    dataloader_prefetch_factor = None
    dataloader_multiprocessing_context = None


def original(batch) -> list[list[int]]:
    ids = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
    return [row[: int(mask.sum())].tolist() for row, mask in zip(ids, batch["attention_mask"], strict=True)]


def test_two_processes_with_two_workers_each(tmp_path, tokenizer):
    """One epoch: every document once, the batches those of four lone readers, and after a stop the same ones again."""
    rows = [json.dumps({"text": f"{number} word word"}) for number in range(72)]
    (tmp_path / "part-0.jsonl").write_text("\n".join(rows))
    one = recipe(tmp_path, long_documents="cut", shuffle_buffer=5)
    one.sources = SOURCES[:1]
    found, epochs = [], []
    for rank in range(2):
        reader = Reader(rank, 2, 2)
        loader = data_loader(batches_of(one, tokenizer, 6, reader), LoaderArguments())
        epoch = list(itertools.islice(loader, 6))  # 18 texts a reader: 3 batches of 6
        assert [batch["report"].consumer for batch in epoch] == [2 * rank, 2 * rank + 1] * 3
        for consumer in reader.own:
            alone = iter(batches_of(one, tokenizer, 6, Reader(consumer, 4, 0)))
            for batch in epoch[consumer - 2 * rank :: 2]:
                expected = next(alone)
                assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "labels"))
        found += numbers([row for batch in epoch for row in original(batch)], tokenizer)

        stopped = Progress.after(0, reader)
        for batch in epoch[:3]:
            report = batch["report"]
            stopped.batches[report.consumer], stopped.places[report.consumer] = report.batches, report.place
        save_progress(tmp_path, reader, stopped, Tally(tokens=3 + rank))
        epochs.append(epoch)
    for rank, epoch in enumerate(epochs):
        reader = Reader(rank, 2, 2)
        progress, total = load_progress(tmp_path, reader)
        assert total.tokens == (7 if rank == 0 else 0)
        rest = itertools.islice(data_loader(batches_of(one, tokenizer, 6, reader, progress), LoaderArguments()), 3)
        for batch, expected in zip(rest, epoch[3:], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "labels"))
            assert batch["report"] == expected["report"]
    assert sorted(found) == list(range(72))


def test_batches_that_no_checkpoint_places_are_read_again(corpus, tokenizer):
    reader = Reader(0, 1, 2)
    first, second = (batches_of(recipe(corpus), tokenizer, 4, Reader(consumer, 2, 0)) for consumer in range(2))
    expected = [list(itertools.islice(first, 4)), list(itertools.islice(second, 4))]
    loader = data_loader(
        batches_of(recipe(corpus), tokenizer, 4, reader, Progress.after(3, reader)), LoaderArguments()
    )
    for batch, wanted in zip(loader, [expected[1][1], expected[0][2], expected[1][2]], strict=False):
        assert torch.equal(batch["input_ids"], wanted["input_ids"])


def test_places_are_those_of_one_run(tmp_path):
    for rank in range(4):  # a checkpoint of this step by four processes, then by two
        save_progress(tmp_path, Reader(rank, 4, 1), Progress([9] * 4, [{}] * 4), Tally(tokens=100))
    for rank in range(2):
        save_progress(tmp_path, Reader(rank, 2, 2), Progress([1, 2, 3, 4], [{}] * 4), Tally(tokens=10))
    progress, total = load_progress(tmp_path, Reader(0, 2, 2))
    assert (progress.batches, total.tokens) == ([1, 2, 3, 4], 20)
    (tmp_path / "data-process1.json").unlink()
    with pytest.raises(RecipeError, match=r"data-process1\.json is missing"):
        load_progress(tmp_path, Reader(0, 2, 2))
    save_progress(tmp_path, Reader(0, 2, 2), Progress([1, 2, 3, 4], [{}] * 4), Tally())
    (tmp_path / "data-process1.json").write_text((tmp_path / "data-process0.json").read_text())
    with pytest.raises(RecipeError, match="do not say where each of 4 readers"):
        load_progress(tmp_path, Reader(0, 2, 2))


def test_another_number_of_readers_is_refused(tmp_path):
    save_progress(tmp_path, Reader(0, 1, 2), Progress([2, 1], [{}, {}]), Tally())
    with pytest.raises(RecipeError, match=r"read by 2 readers .* this run has 3"):
        load_progress(tmp_path, Reader(0, 1, 3))
    progress, _ = load_progress(tmp_path, Reader(1, 2, 0))  # two processes in place of two workers: the same batches
    assert progress.batches == [2, 1]
    with pytest.raises(RecipeError, match=r"\[1, 2\] batches to process 0"):
        Reader(0, 1, 2).turn(Progress([1, 2], [None, None]))


def test_what_is_lost_is_counted(tmp_path, tokenizer):
    """Documents of 6 and 21 tokens into rows of at most 12: cut keeps 10 of 21, split and pack all."""
    write(tmp_path / "part-0.jsonl", 0, 10)
    reports = {}
    for form in ("cut", "split", "pack"):
        of = recipe(tmp_path, long_documents=form, shuffle_buffer=1)
        of.sources = SOURCES[:1]
        batch = next(iter(batches_of(of, tokenizer, 6, Reader())))
        reports[form] = batch["report"]
        lengths = batch["attention_mask"].sum(dim=1)
        assert batch["report"].tally.tokens == lengths.sum()
        assert batch["report"].tally.pairs == (lengths**2).sum()
        assert batch["report"].tally.masked == (batch["labels"] != IGNORED).sum() > 0
        assert batch["report"].sources == {"parts": len(lengths)}
    # rows of 0 (long), 1, 2, 3 (long), 4, 5
    assert reports["cut"].tally.lost == 11 + 11
    assert reports["cut"].tally.positions == 6 * 12
    assert reports["cut"].tally.tokens == 12 + 8 + 8 + 12 + 8 + 8
    assert reports["cut"].tally.padding_share == pytest.approx(16 / 72)
    assert reports["cut"].tally.lost_share == pytest.approx(22 / (22 + 10 + 6 + 6 + 10 + 6 + 6))
    assert reports["split"].tally.lost == reports["pack"].tally.lost == 0
    # 12 + 12 + 3, 8, 8, 12 + 12 + 3 = 70 of 72 tokens; the next row has 8
    assert (reports["pack"].tally.sequences, reports["pack"].tally.tokens) == (8, 70)
    assert reports["split"].tally.sequences == 6


def test_packed_batches_lose_nothing_and_fill_up(corpus, tokenizer):
    found = []
    whole = [row["input_ids"] for row in sequences(recipe(corpus), SOURCES[1:], tokenizer)]
    packed = recipe(corpus, long_documents="pack")
    packed.sources = SOURCES[1:]
    for batch in itertools.islice(batches_of(packed, tokenizer, 4, Reader()), 30):
        found += original(batch)
        assert 48 - 12 < batch["report"].tally.tokens <= 48
    assert sorted(found[: len(whole)]) == sorted(whole)  # one epoch


def test_heldout_documents_are_a_property_of_their_text(corpus, tokenizer):
    shared = [Source(name="parts", path="part-*.jsonl", heldout_share=0.3)]
    cut = recipe(corpus, long_documents="cut")
    sides = [
        set(numbers([row["input_ids"] for row in sequences(cut, shared, tokenizer, heldout=side)], tokenizer))
        for side in (False, True)
    ]
    assert sides[0] | sides[1] == {number for number in TEXTS if number < 100}
    assert not sides[0] & sides[1]
    assert 10 < len(sides[1]) < 30
    texts = [json.loads(line)["text"] for part in range(3) for line in open(corpus / f"part-{part}.jsonl")]
    assert {int(text.split()[0]) for text in texts if text.strip() and is_heldout(text.encode(), 0.3)} == sides[1]


@pytest.fixture
def shards(corpus, tokenizer):
    texts = [json.loads(line)["text"] for part in range(3) for line in open(corpus / f"part-{part}.jsonl")]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def save(name: str, rows: list, kind=None, **metadata: str):
        column = pa.array(rows, type=kind or pa.list_(pa.int32()))
        table = pa.table({"input_ids": column}).replace_schema_metadata(metadata)
        pq.write_table(table, corpus / name, row_group_size=10)

    save("ids.parquet", ids, tokenizer="mine", vocab_size=str(len(tokenizer)))
    save("other.parquet", ids, tokenizer="theirs", vocab_size="61056")
    save("special.parquet", [[101, *ids[0], 102]])
    save("foreign.parquet", [[5, 60_000]])
    save("text.parquet", ["a"], pa.string())
    return corpus


def test_tokenised_shards_are_the_texts(shards, tokenizer):
    for form in ("cut", "split"):
        of = recipe(shards, long_documents=form)
        tokens = list(sequences(of, [Source(name="ids", path="ids.parquet", tokens="input_ids")], tokenizer))
        assert tokens == list(sequences(of, [Source(name="parts", path="part-*.jsonl")], tokenizer))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "special.parquet", "tokens": "input_ids"}, "begins or ends with a special token"),
        ({"path": "foreign.parquet", "tokens": "input_ids"}, "token ids 5 to 60000, another tokenizer's"),
        ({"path": "other.parquet", "tokens": "input_ids"}, "of theirs with 61056 entries, the recipe's .* has 30522"),
        ({"path": "text.parquet", "tokens": "input_ids"}, "holds string, not lists of token ids"),
        ({"path": "ids.parquet", "tokens": "ids"}, "no column 'ids'; it has input_ids"),
        ({"path": "single.jsonl", "weight": 0.0}, "weight=0.0 is not above 0"),
        ({"path": "single.jsonl", "heldout_share": 1.0}, r"heldout_share=1.0 is not in \[0, 1\)"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(shards, tokenizer, source, message):
    with pytest.raises(RecipeError, match=message) as error:
        list(sequences(recipe(shards), [Source(name="mine", **source)], tokenizer))
    assert "source mine" in str(error.value)


@pytest.mark.parametrize("name", ["no/such-folder", "/no/such/folder"])
def test_a_tokenizer_that_is_not_there_is_named(name):
    with pytest.raises(RecipeError, match=f"tokenizer='{name}' cannot be loaded: "):
        open_tokenizer(name)


def test_a_reader_without_documents_is_an_error(tmp_path, tokenizer):
    write(tmp_path / "part-0.jsonl", 0, 3)
    few = recipe(tmp_path)
    few.sources = SOURCES[:1]
    with pytest.raises(RecipeError, match="fewer documents than"):
        next(iter(batches_of(few, tokenizer, 2, Reader(3, 4, 0))))
    with pytest.raises(RecipeError, match="source parts: no document"):  # in a worker: not a hang
        list(itertools.islice(data_loader(batches_of(few, tokenizer, 2, Reader(0, 1, 4)), LoaderArguments()), 4))


STREAMED = """
import sys
from transformers import AutoTokenizer
from training.masking import WholeWordMaskingCollator
from training.packing import Reader, TrainingBatches, data_loader
from training.recipe import MLMRecipe, Source
from training.sources import open_sources

class Arguments:
    dataloader_pin_memory = False
    dataloader_prefetch_factor = dataloader_multiprocessing_context = None

if __name__ == "__main__":
    recipe = MLMRecipe(sources=[Source(name="web", hub="me/web")], long_documents="cut", shuffle_buffer=4)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    opened = open_sources(recipe, recipe.sources, tokenizer)
    batches = TrainingBatches(opened, recipe, WholeWordMaskingCollator(tokenizer), 5, Reader(0, 1, 2))
    loader = iter(data_loader(batches, Arguments()))
    print(sorted({next(loader)["report"].consumer for _ in range(4)}), batches.opened[0].dataset.num_shards)
"""


def test_a_hub_data_set_is_streamed_by_two_workers(tmp_path):
    """Over real HTTP: connections opened before the workers were forked must not be used by them."""
    files = {
        f"data/train-{part}.jsonl": b"".join(b'{"text": "a word %d"}\n' % i for i in range(20)) for part in range(2)
    }
    with serve({"me/web": files}) as (endpoint, requests):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", STREAMED, str(SHIPPED)],
            capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=120,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert "[0, 1] 2" in process.stdout
    assert all(any(f"train-{part}.jsonl" in request for request in requests) for part in range(2))
