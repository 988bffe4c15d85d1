"""The steps of corpus preparation, each by itself: rows shared out, languages, quality, shards, the lock."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from corpus_data import GERMAN, RECIPES, document, english
from tokenizers import Tokenizer

from training import corpus
from training.corpus_recipe import CorpusRecipe, Quality
from training.corpus_steps import LinguaFilter, OpenFiles, QualityFilter, ShardFiles, TokenShards, hold, share, windows
from training.recipe import RecipeError, Source, load_recipe
from training.source_files import open_source


def test_an_unfinished_task_has_no_shards(tmp_path):
    identity = {"tokenizer": "t", "vocab_size": "9", "tokenizer_sha256": "0"}

    def attempt(last: list):
        with ShardFiles(tmp_path, 0, 5, identity) as files:
            files.write("train/a", [[1, 2, 3], [4, 5, 6]])
            files.write("train/a", last)

    with pytest.raises(TypeError):
        attempt([None, 7])
    assert not list(tmp_path.glob("train/*/*"))
    attempt([[7]])
    attempt([[7]])  # replaces the first
    shards = sorted(tmp_path.glob("train/a/*.parquet"))
    assert [shard.name for shard in shards] == ["00000-000.parquet", "00000-001.parquet"]
    assert [pq.read_table(shard)["input_ids"].to_pylist() for shard in shards] == [[[1, 2, 3], [4, 5, 6]], [[7]]]


def test_documents_are_written_uncut_whatever_the_tokenizer_truncates_at(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    baked = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    baked.enable_truncation(8)
    baked.enable_padding(length=300)
    baked.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    texts = ["Naïve CAFÉ prices: 3,5 €! " * 20, "[CLS] is a token. [MASK] too [SEP]", "\u200b\u0007"]
    step = TokenShards(str(tmp_path / "tokens"), str(tmp_path / "tokenizer"), 0.0, 1000)
    step.run([document(text) for text in texts])
    (shard,) = tmp_path.glob("tokens/train/mine/*.parquet")
    written = pq.read_table(shard)["input_ids"].to_pylist()
    assert written[0] == tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert len(written[0]) > 100
    assert tokenizer.convert_ids_to_tokens(written[1]) == "[ cl ##s ] is a token . [ mask ] too [ sep ]".split()
    assert step.stats["mine|without_tokens"].total == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    lock = tmp_path / ".lock"
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w+'); fcntl.lockf(file, fcntl.LOCK_SH); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="another run are still at work"):
            hold(str(lock), alone=True)
    finally:
        other.communicate("")
    hold(str(lock), alone=True)


def test_a_task_may_open_a_file_for_every_task_before_it():
    """The limit that most systems set is below the 1,024 signatures of C4."""
    code = """if True:
        import resource
        from training.corpus_steps import OpenFiles
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        assert list(OpenFiles().run(iter([1, 2]))) == [1, 2]
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most > 64)
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "True\n", process.stderr
    stages = {stage.name: stage for stage in corpus.stages(load_recipe(CorpusRecipe, RECIPES / "corpus-c4.yaml"))}
    for name in ("buckets", "clusters"):  # one reads a file of every task, one writes one
        assert isinstance(stages[name].pipeline[0], OpenFiles)


@pytest.mark.parametrize(("files", "tasks"), [(1, 4), (3, 7), (4, 4), (5, 2)])
def test_the_tasks_share_out_all_rows(tmp_path, files, tasks):
    for file in range(files):
        lines = "".join(json.dumps({"text": f"{file} {row}"}) + "\n" for row in range(10))
        (tmp_path / f"{file}.jsonl").write_text(lines)
    source = Source(name="mine", path="*.jsonl")
    shares = [
        [row["text"] for _, row in share(open_source(source, str(tmp_path), streaming=True), rank, tasks)]
        for rank in range(tasks)
    ]
    assert all(shares)
    expected = [f"{file} {row}" for file in range(files) for row in range(10)]
    assert sorted(text for texts in shares for text in texts) == expected


def test_the_language_of_the_whole_text_counts():
    language = LinguaFilter(["en"], 0.65, 1200)
    header = "This book is for the use of anyone anywhere at no cost and with almost no restrictions. " * 8
    assert len(header) > 600
    assert language.filter(document(header)) is True
    assert language.filter(document(header + GERMAN * 20)) == (False, "de")
    assert language.filter(document("12 + 34 = 46")) == (False, "unsure")
    assert LinguaFilter(["en", "de"], 0.65, 1200).filter(document(GERMAN)) is True
    assert len(windows("x" * 5000, 1200)) == 1202


SENTENCES = "The river rose at night. It fell before noon. Nobody was hurt. The fields were lost. Bread came by boat."


@pytest.mark.parametrize(
    ("quality", "text", "verdict", "left"),
    [
        (Quality("c4_quality"), f"{SENTENCES}\nHome | About | Menu", True, SENTENCES),
        (Quality("c4_quality"), "One sentence is too few.", (False, "too_few_sentences"), None),
        (Quality("c4_quality", arguments={"min_num_sentences": -1}), "menu\nhome", (False, "nothing_left"), None),
        (Quality("gopher_quality"), english(1, words=36), (False, "gopher_short_doc"), None),
        (Quality("gopher_quality", arguments={"min_doc_words": 20}), english(1, words=36), True, None),
        (Quality("gopher_repetition", skip=["mine"]), "\n".join(["The same line."] * 9), True, None),
        (Quality("fineweb_quality"), "a menu\nanother entry\n" * 20, (False, "line_punct_ratio"), None),
    ],
    ids=lambda value: value.filter if isinstance(value, Quality) else None,
)
def test_quality_filters_need_no_download(quality, text, verdict, left):
    doc = document(text)
    step = QualityFilter("x", corpus.quality_filter(quality), quality.skip)
    assert step.filter(doc) == verdict
    assert left is None or doc.text == left
