"""What the help of `jina-bert` says: each example can be given as it stands, and the documents show the help itself.

Pins: every example of every verb is taken by the option checks of the program, and those of `encode`, `chunk` and
`search` run to the end; what README.md and CLI.md show after `jina-bert ... --help` is what the program prints.
"""

import re
import shlex

import pytest
from cli_runs import (  # noqa: F401  pytest finds the fixtures by name
    LIBRARY,
    app,
    in_a_folder,
    loaded_once,
    run,
    succeed,
    write,
)
from conftest import REPOSITORY
from typer.main import get_command

from hub_repo.cli.delegate import programs

TEXTS = ["One sentence. And a second one!", "Why is the door so low? Nobody knows."]
PACKAGES = {"train": "training", "evaluate": "evaluation", "benchmark": "benchmarks"}


def commands(group, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def examples():
    """Verb and words of each example in the help, in the order in which one builds on another."""
    for names, command in commands(get_command(app())):
        for line in re.findall(r"^.*jina-bert .*$", command.epilog, flags=re.MULTILINE):
            yield names, line.strip().removeprefix("Example: ")


EXAMPLES = list(examples())


@pytest.fixture
def inputs(tmp_path):
    """The files that the examples read, in the current folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "hub_repo").symlink_to(REPOSITORY / "hub_repo")
    (tmp_path / "training").symlink_to(REPOSITORY / "training")
    (tmp_path / "evaluation").symlink_to(REPOSITORY / "evaluation")
    for name in ("corpus.jsonl", "corpus.jsonl.zst", "articles.jsonl"):
        write(tmp_path / name, TEXTS, {"_id": ["a", "b"], "body": TEXTS})
    pq.write_table(pa.table({"text": TEXTS, "spans": [[[0, 13], [14, 31]], [[0, 23]]]}), "sections.parquet")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "speech.txt").write_text((LIBRARY / "speech-lincoln.txt").read_text())
    for name in ("book.txt", "lines.txt", "questions.txt"):
        (tmp_path / name).write_text("\n".join(TEXTS))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "README.md").write_text((REPOSITORY / "hub_repo" / "tiny" / "README.md").read_text())
    return tmp_path


def test_every_verb_has_help_with_an_example():
    verbs = dict(commands(get_command(app())))
    assert len(verbs) == 13
    for names in verbs:
        shown = " ".join(succeed(*names, "--help")[0].split())
        assert f"jina-bert {' '.join(names)} " in shown.partition("Example")[2], names


@pytest.mark.parametrize(("names", "line"), EXAMPLES, ids=[" ".join(names) for names, _ in EXAMPLES])
def test_the_program_takes_each_example(inputs, names, line):
    words = shlex.split(line.partition("jina-bert ")[2].partition(" > ")[0].partition(" < ")[0])
    assert tuple(words[: len(names)]) == names
    command = dict(commands(get_command(app())))[names]
    with command.make_context(" ".join(names), words[len(names) :]) as context:
        if names[0] in PACKAGES:
            assert context.params["name"] in programs(PACKAGES[names[0]])


def test_the_examples_that_embed_run_in_their_order(inputs):
    done = []
    for names, line in EXAMPLES:
        if names[0] not in ("encode", "chunk", "search"):
            continue
        piped = re.search(r"^cat (\S+) \||< (\S+)", line)
        stdin = (inputs / (piped[1] or piped[2])).read_bytes() if piped else b""
        words = shlex.split(re.sub(r" [<>] \S+", "", line.partition("jina-bert ")[2]))
        words = [x for word in words for x in (sorted(map(str, inputs.glob(word))) if "*" in word else [word])]
        succeed(*words, stdin=stdin)
        done.append(names)
    assert len(done) == 10
    made = {"corpus.parquet", "lines.npy", "book.parquet", "chunks.jsonl", "sections.jsonl", "library.index"}
    assert made <= {path.name for path in inputs.iterdir()}


@pytest.mark.parametrize(("document", "shown"), [("hub_repo/CLI.md", ["", "encode "]), ("README.md", [""])])
def test_the_documents_show_the_help_itself(document, shown, monkeypatch):
    """`shown` has to be there; whatever else is shown has to be right."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^\$ COLUMNS=110 jina-bert ([a-z ]*)--help$(.*?)^(?=```|\$ )", text, re.DOTALL | re.M))
    assert set(shown) <= set(blocks)
    monkeypatch.setenv("COLUMNS", "110")
    for verb, block in blocks.items():
        stdout, _ = succeed(*verb.split(), "--help")
        assert block.strip("\n") == "\n".join(line.rstrip() for line in stdout.splitlines()).strip("\n"), verb
