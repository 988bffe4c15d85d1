"""Pairs of neighbouring sentences: which there are, which are chosen, and files that are whole."""

import json

import pytest
import zstandard

from training.recipe import RecipeError, Source
from training.sentence_pairs import SentenceRecipe, choose, sentence_pairs, write_pairs

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


def recipe(folder, output, **changes) -> SentenceRecipe:
    sources = [Source(name=name, path=f"{name}.jsonl") for name in ("river", "more")]
    return SentenceRecipe(**{"output_dir": str(output), "data_dir": str(folder), "sources": sources, **changes})


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
    with pytest.raises(RecipeError, match="source more: no two neighbouring sentences"):
        write_pairs(recipe(tmp_path, tmp_path / "other"))
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["river.jsonl.zst"]
    (tmp_path / "more.jsonl").write_text(json.dumps({"words": TEXT}) + "\n")
    with pytest.raises(RecipeError, match="more"):
        write_pairs(recipe(tmp_path, tmp_path / "third"))
    with pytest.raises(RecipeError, match="min_words"):
        write_pairs(recipe(tmp_path, tmp_path / "fourth", min_words=9, max_words=3))
