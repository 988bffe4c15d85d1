"""Pairs from documents without labels: which there are, which are chosen, and files that are whole."""

import json

import pytest
import zstandard

from training.document_pairs import DocumentPairsRecipe, Kind, choose, passage_pairs, sentence_pairs, write_pairs
from training.recipe import RecipeError, Source

TEXT = (
    "The river rises in the hills above the town. It is joined there by two small streams. Short one here. "
    "The old mill stood for many years beside it. 12 34 56 78 90 11 22. Nobody now remembers who had built it. "
    "The miller left when the railway came. His son became a teacher in the city."
)


def test_neighbours_that_are_prose_make_pairs_and_a_sentence_is_in_one():
    assert list(sentence_pairs(TEXT)) == [
        ("The river rises in the hills above the town.", "It is joined there by two small streams."),
        ("Nobody now remembers who had built it.", "The miller left when the railway came."),
    ]
    assert list(sentence_pairs(TEXT, max_words=7)) == [
        ("Nobody now remembers who had built it.", "The miller left when the railway came.")
    ]
    assert list(sentence_pairs("")) == []


def test_the_choice_depends_on_the_pairs_and_the_seed_alone():
    pairs = [(f"first {n}", f"second {n}") for n in range(5000)]
    chosen = choose(pairs, 40, seed=1)
    assert choose(reversed([*pairs, *pairs]), 40, seed=1) == chosen
    assert len(set(chosen)) == 40
    assert choose(pairs, 40, seed=2) != chosen
    assert sorted(choose(pairs, None, seed=1)) == sorted(pairs)


def recipe(folder, output, **changes) -> DocumentPairsRecipe:
    sources = [Source(name=name, path=f"{name}.jsonl") for name in ("river", "more")]
    return DocumentPairsRecipe(**{"output_dir": str(output), "data_dir": str(folder), "sources": sources, **changes})


def test_files_are_written_once_and_what_makes_no_pair_is_said(tmp_path):
    (tmp_path / "river.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "No pair.")))
    output = tmp_path / "sentences"
    assert write_pairs(recipe(tmp_path, output)) == {"river": 2, "more": 2}
    lines = zstandard.decompress((output / "river.jsonl.zst").read_bytes()).decode().splitlines()
    assert {(row["query"], row["positive"]) for row in map(json.loads, lines)} == set(sentence_pairs(TEXT))
    (output / "more.jsonl.zst").unlink()
    assert write_pairs(recipe(tmp_path, output)) == {"more": 2}

    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "No pair."}) + "\n")
    with pytest.raises(RecipeError, match="source more: no pair of sentences"):
        write_pairs(recipe(tmp_path, tmp_path / "other"))
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["recipe.yaml", "river.jsonl.zst"]
    with pytest.raises(RecipeError, match=r"another recipe: there max_words is 40, here 39"):
        write_pairs(recipe(tmp_path, output, max_words=39))
    (tmp_path / "more.jsonl").write_text(json.dumps({"words": TEXT}) + "\n")
    with pytest.raises(RecipeError, match="more"):
        write_pairs(recipe(tmp_path, tmp_path / "third"))
    with pytest.raises(RecipeError, match="min_words"):
        write_pairs(recipe(tmp_path, tmp_path / "fourth", min_words=9, max_words=3))


def test_sources_that_would_be_read_otherwise_than_said_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    twice = [Source(name="x", path=f"{name}.jsonl") for name in ("a", "b")]
    with pytest.raises(RecipeError, match="two are named 'x'"):
        write_pairs(recipe(tmp_path, tmp_path / "out", sources=twice))
    held = [Source(name="x", path="a.jsonl", heldout_share=0.1)]
    with pytest.raises(RecipeError, match="heldout_share would hold nothing out"):
        write_pairs(recipe(tmp_path, tmp_path / "out", sources=held))


def document(sentences: int) -> str:
    return " ".join(f"Sentence number {n} has these seven words." for n in range(sentences))


def test_a_passage_and_the_rest_are_the_stretch():
    pairs = list(passage_pairs(document(100), min_words=20, max_words=40, document_words=210))
    assert len(pairs) == 3, "the fourth stretch of ten sentences has too little beside the passage"
    places = set()
    for number, (passage, rest) in enumerate(pairs):
        stretch = [f"Sentence number {n} has these seven words." for n in range(30 * number, 30 * (number + 1))]
        first = stretch.index(passage[: passage.index(".") + 1])
        places.add(first)
        assert passage == " ".join(stretch[first : first + 3])
        assert rest == " ".join(stretch[:first] + stretch[first + 3 :])
    assert len(places) > 1
    assert list(passage_pairs(document(100), min_words=20, max_words=40, document_words=210)) == pairs


def test_what_makes_no_passage():
    assert list(passage_pairs("")) == []
    assert list(passage_pairs(document(3))) == []
    assert list(passage_pairs("12 34 56. " * 400)) == []
    assert list(passage_pairs("Always the same seven words are here. " * 100)) == [], "the passage is in the rest"


def test_passages_are_a_kind_of_the_recipe(tmp_path):
    for name in ("river", "more"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": document(100)}) + "\n")
    options = {"kind": Kind.passages, "min_words": 20, "max_words": 40, "document_words": 210}
    assert write_pairs(recipe(tmp_path, tmp_path / "passages", **options)) == {"river": 3, "more": 3}
    with pytest.raises(RecipeError, match="document_words=100 is below three times max_words"):
        write_pairs(recipe(tmp_path, tmp_path / "short", **{**options, "document_words": 100}))
