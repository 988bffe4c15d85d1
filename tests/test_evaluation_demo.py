"""Laws of the demo: every word of a document is in exactly one passage, at the position it is shown with; ranking is
by cosine; names on the map do not overlap; a document is embedded whole; bad input is one line and status 2; the whole
runs offline on a random model and writes a PNG."""

import shutil
from itertools import combinations

import numpy as np
import pytest
from conftest import REPOSITORY, SHIPPED
from matplotlib.figure import Figure

from evaluation import demo, demo_map
from modeling_jina_bert import JinaBertConfig, JinaBertModel

SHIPPED_TEXTS = sorted((REPOSITORY / "evaluation" / "demo_library").glob("*.txt"))
TEXTS = {
    "book-whale": "The Whale\n\nCall me Ishmael. Some years ago I went to sea.\n\n" + "The whale was white. " * 60,
    "pep-zip": "The zip function\n\n" + "It joins two lists, element by element. " * 12,
    "plain": "A note\n\nShort [bold]and[/bold] plain.",
}


@pytest.mark.parametrize("words", [7, 40, 120])
@pytest.mark.parametrize("path", SHIPPED_TEXTS, ids=lambda path: path.stem)
def test_passages_partition_the_words(path, words):
    text = path.read_text(encoding="utf-8")
    passages = demo.split_passages(text, document=3, words=words)
    all_words = text.split()
    assert " ".join(passage.text for passage in passages).split() == all_words
    for passage in passages:
        assert passage.document == 3
        assert passage.text.split() == all_words[passage.start : passage.start + passage.words]
        assert 0 < passage.words <= words + words // 4


def test_passages_follow_paragraphs_then_sentences():
    paragraphs = ["a " * 90, "b " * 90, "Heading", "c " * 119 + "end.", "d e. " * 100]
    passages = demo.split_passages("\n\n".join(paragraphs), words=120)
    spans = [(passage.start, passage.words) for passage in passages]
    assert spans == [(0, 90), (90, 91), (181, 120), (301, 120), (421, 80)]
    assert passages[2].text.endswith("end.")
    assert passages[3].text.endswith("e.")


def test_a_heading_stays_with_the_text_below_it():
    text = "a " * 110 + "\n\nA heading of many words, twelve in all, above a paragraph.\n\n" + "b " * 119
    passages = demo.split_passages(text, words=120)
    spans = [(passage.start, passage.words) for passage in passages]
    assert spans == [(0, 110), (110, 130)]


def test_passages_of_nothing():
    assert demo.split_passages(" \n ") == []


def test_rank_by_cosine_with_stable_ties():
    vectors = np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8]])
    ranked = demo.rank(np.array([1.0, 0.0]), vectors, top=3)
    assert [index for index, _ in ranked] == [2, 1, 3]
    assert [score for _, score in ranked] == pytest.approx([1.0, 0.6, 0.6])


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_projection_of_few_rows(rows):
    points = demo_map.project(np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32))
    assert points.shape == (rows, 2)
    assert np.isfinite(points).all()


def test_names_on_the_map_do_not_overlap():
    labels = [demo.Document(path.stem, "").label for path in SHIPPED_TEXTS]
    points = np.random.default_rng(0).normal(size=(len(labels), 2))
    axes = Figure(figsize=(13, 9), dpi=120).add_subplot()
    axes.scatter(*points.T)
    overlaps = {}
    for method in ("beside their dots", "moved apart"):
        if method == "moved apart":
            texts = demo_map.draw_labels(axes, points, labels=labels, colours=["black"] * len(labels))
        else:
            texts = [axes.text(*point, label) for point, label in zip(points, labels, strict=True)]
        axes.figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts]
        overlaps[method] = sum(bool(first.overlaps(second)) for first, second in combinations(boxes, 2))
        for text in texts:
            text.remove()
    assert overlaps["beside their dots"] > 0
    assert overlaps["moved apart"] == 0


def test_the_shipped_library_states_its_sources():
    sources = (SHIPPED_TEXTS[0].parent / "SOURCES.md").read_text(encoding="utf-8")
    assert len(SHIPPED_TEXTS) >= 15
    assert all(f"| {path.name} |" in sources for path in SHIPPED_TEXTS)
    assert sum(path.stat().st_size for path in SHIPPED_TEXTS) < 1_200_000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    config = JinaBertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    JinaBertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(SHIPPED / name, folder)
    return folder


@pytest.fixture
def library_folder(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "SOURCES.md").write_text("not a document")
    return folder


def test_end_to_end(model_folder, library_folder, tmp_path, capsys):
    output = tmp_path / "deep" / "output"
    arguments = ["--model", str(model_folder), "--library", str(library_folder), "--output", str(output)]
    assert demo.main([*arguments, "--query", "Who saw the [white] whale?", "What is zip?"]) == 0
    assert (output / "map.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Who saw the [white] whale?" in printed
    assert "Library: 3 documents, 4 passages" in printed
    assert "of 252" in printed


@pytest.mark.parametrize("native", [False, True])
def test_half_precision_is_recommended_where_the_processor_has_it(
    native, model_folder, library_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "multiplies_bf16", lambda: native)
    arguments = ["--model", str(model_folder), "--library", str(library_folder), "--output", str(tmp_path)]
    for dtype in ("float32", "bfloat16"):
        assert demo.main([*arguments, "--query", "Who saw the whale?", "--dtype", dtype]) == 0
        printed = capsys.readouterr().out
        assert f"{dtype}, loaded in" in printed
        assert ("dtype=torch.bfloat16" in printed) == (native and dtype == "float32")


def test_documents_are_embedded_whole(model_folder):
    model = demo.load_model(str(model_folder))
    document = demo.Document("long", "word " * 8200 + "whale " * 800)
    library = demo.embed_library(model, [document])
    assert library.document_tokens == [9002]
    assert len(library.passages) == library.passage_vectors.shape[0] == 75
    whole, cut = (
        model.encode(document.text, truncation=truncation, normalize_embeddings=True) for truncation in (False, True)
    )
    np.testing.assert_allclose(library.document_vectors[0], whole, atol=1e-6)
    assert np.abs(whole - cut).max() > 1e-3  # the last 800 words are beyond what `encode` takes by default
    np.testing.assert_allclose(np.linalg.norm(library.passage_vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "broken", ["no library", "empty library", "no model", "no weights", "empty query", "not UTF-8"]
)
def test_bad_input_is_one_line_and_status_2(broken, model_folder, library_folder, tmp_path, capsys):
    query = "whale"
    if broken == "no library":
        library_folder = tmp_path / "missing"
    elif broken == "empty library":
        for path in library_folder.glob("*.txt"):
            path.unlink()
    elif broken == "no model":
        model_folder = tmp_path / "missing"
    elif broken == "no weights":
        model_folder = shutil.copytree(model_folder, tmp_path / "weightless")
        (model_folder / "model.safetensors").unlink()
    elif broken == "empty query":
        query = "  "
    else:
        (library_folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    arguments = ["--model", str(model_folder), "--library", str(library_folder), "--output", str(tmp_path)]
    assert demo.main([*arguments, "--query", query]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("demo: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "map.png").exists()
