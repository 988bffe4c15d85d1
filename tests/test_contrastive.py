"""Losses against a slow float64 reference of the paper's formulas, the batches, the loading of pairs and negatives.

Laws: mini-batches of any kind change neither loss nor gradients; a batch has one source and no false negative, and
follows from the seed and its number alone; what is wrong with a row is said with its source and number.
"""

import csv
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tiny_config
from datasets import Dataset, DatasetDict
from torch.nn.functional import normalize

from modeling_jina_bert import JinaBertModel
from training.contrastive import load_model
from training.losses import build_loss
from training.packing import Reader
from training.pair_evaluation import retrieval_set
from training.pair_filters import pair_key
from training.pair_sampling import ProcessBatches, SourceBatches
from training.pair_sources import load_sources, split_heldout
from training.recipe import ContrastiveRecipe, RecipeError, Source

DATA = REPOSITORY / "tests" / "data"
TEMPERATURE = 0.05


def info_nce(scores: torch.Tensor) -> torch.Tensor:
    """E[-ln e^{s_ii} / sum_j e^{s_ij}], written out."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(scores.shape[0]):
        total = total - torch.log(torch.exp(scores[i, i]) / torch.exp(scores[i]).sum())
    return total / scores.shape[0]


def paper_loss(queries, positives, negatives) -> torch.Tensor:
    """L_pairs without negatives, L_NCE+ with: section 5.2 of the paper, in float64."""
    q, p = normalize(queries, dim=1), normalize(positives, dim=1)
    documents = torch.cat([p, *(normalize(n, dim=1) for n in negatives)])
    return info_nce(q @ documents.T / TEMPERATURE) + info_nce(p @ q.T / TEMPERATURE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    JinaBertModel(tiny_config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe(folder, **changes) -> ContrastiveRecipe:
    sources = [Source(name="facts", path="triplets.jsonl" if changes.get("num_negatives") else "pairs.jsonl")]
    return ContrastiveRecipe(**{"model": str(folder), "data_dir": str(DATA), "sources": sources, **changes})


def cut(embeddings: torch.Tensor, dimension: int | None) -> torch.Tensor:
    return embeddings[:, :dimension]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mini_batch_size": 3},
        {"mini_batch_tokens": 150, "mini_batch_size": 2},
        {"matryoshka_dims": [64, 24]},
        {"matryoshka_dims": [64, 24], "mini_batch_tokens": 150},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_negatives", [0, 3])
def test_the_loss_is_half_of_the_paper(folder, num_negatives, options):
    config = recipe(folder, num_negatives=num_negatives, **options)
    model = load_model(config).double()
    rows = load_sources(config)["facts"].select(range(7))
    features = [model.preprocess(rows[column][:]) for column in rows.column_names]
    assert len(features) == 2 + num_negatives

    loss = build_loss(model, config)(features, torch.empty(0))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    embeddings = [model(dict(feature))["sentence_embedding"] for feature in features]
    expected = sum(
        paper_loss(*(cut(e, dimension) for e in embeddings[:2]), [cut(e, dimension) for e in embeddings[2:]])
        for dimension in options.get("matryoshka_dims", [None])
    )
    (expected / 2).backward()

    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-9)
    assert gradients
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"mini_batch_tokens": 150, "mini_batch_size": 2}], ids=str)
def test_one_direction_is_the_first_sum_of_the_paper(folder, options):
    config = recipe(folder, num_negatives=3, bidirectional=False, **options)
    model = load_model(config).double()
    rows = load_sources(config)["facts"].select(range(7))
    features = [model.preprocess(rows[column][:]) for column in rows.column_names]
    queries, *documents = [
        normalize(model(dict(feature))["sentence_embedding"], dim=1).detach() for feature in features
    ]
    expected = info_nce(queries @ torch.cat(documents).T / TEMPERATURE)
    assert build_loss(model, config)(features, torch.empty(0)).item() == pytest.approx(expected.item(), rel=1e-9)


def test_mini_batches_keep_the_budget_and_hold_texts_of_like_length(folder):
    config = recipe(folder, mini_batch_tokens=200, max_length=64)
    model = load_model(config)
    rows = load_sources(config)["facts"].select(range(40))
    features = [model.preprocess(rows[column][:]) for column in ("anchor", "positive")]
    seen = []
    forward = model.forward
    model.forward = lambda batch, **kwargs: seen.append(batch["attention_mask"].clone()) or forward(batch, **kwargs)
    build_loss(model, config)(features, torch.empty(0)).backward()
    assert sum(map(len, seen)) == 2 * 2 * 40  # every text twice: without and with gradients
    assert 2 * 2 < len(seen) < 2 * 2 * 40 / 2
    assert all(mask.sum() <= 200 for mask in seen)
    padding = sum(int((mask == 0).sum()) for mask in seen)
    whole = 2 * sum(int((feature["attention_mask"] == 0).sum()) for feature in features)
    assert padding < 0.3 * whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mini_batch_tokens": 0}, "mini_batch_tokens=0 is below 1"),
        ({"mini_batch_size": 0}, "mini_batch_size=0 is below 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"matryoshka_dims": [64, 65]}, "from 1 to the model's 64"),
        ({"matryoshka_dims": [64, 64]}, "different dimensions"),
    ],
)
def test_losses_that_cannot_be_are_refused(folder, changes, message):
    config = recipe(folder, **changes)
    with pytest.raises(RecipeError, match=message):
        build_loss(load_model(config), config)


def test_negatives_are_filled_or_refused(folder, tmp_path):
    lines = (DATA / "triplets.jsonl").read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    sources = [Source(name="short", path="short.jsonl")]
    with pytest.raises(RecipeError, match=r"source short: row 0 has 15 of 20 negatives"):
        load_sources(recipe(folder, data_dir=str(tmp_path), sources=sources, num_negatives=20))
    rows = load_sources(
        recipe(folder, data_dir=str(tmp_path), sources=sources, num_negatives=20, fill_negatives="random")
    )["short"]
    for row in rows:
        negatives = [row[f"negative_{i}"] for i in range(1, 21)]
        assert len(set(negatives)) == 20
        assert row["positive"] not in negatives


def test_a_source_without_negatives_has_random_ones_that_are_no_positive_of_the_anchor(folder, tmp_path):
    rows = [{"query": f"question {i % 5}", "positive": f"answer {i}"} for i in range(15)]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        "data_dir": str(tmp_path),
        "sources": [Source(name="plain", path="plain.jsonl", negatives=None)],
        "num_negatives": 12,
    }
    with pytest.raises(RecipeError, match=r"source plain: row 0 has 0 of 12 negatives; set fill_negatives"):
        load_sources(recipe(folder, **changes))
    for index, row in enumerate(load_sources(recipe(folder, **changes, fill_negatives="random"))["plain"]):
        others = {f"answer {i}" for i in range(15) if i % 5 != index % 5}
        assert {row[f"negative_{i}"] for i in range(1, 13)} == others


def test_copies_in_other_case_and_whitespace_are_no_pair_and_no_negatives(folder, tmp_path):
    negatives = ["ANSWER  0", "question 0 ", "Wrong", " wrong", "other"]
    rows = [{"query": "Question 0", "positive": "Answer 0", "negatives": negatives}]
    rows += [{"query": "question  0", "positive": f"Answer {i}", "negatives": []} for i in (1, 2)]
    rows += [{"query": "Same", "positive": "same\n", "negatives": []}]
    rows += [{"query": f"q{i}", "positive": f"filler {i}", "negatives": []} for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [Source(name="mine", path="mine.jsonl")]
    changes = {"data_dir": str(tmp_path), "sources": sources, "fill_negatives": "random"}
    loaded = load_sources(recipe(folder, num_negatives=4, **changes))["mine"]
    assert len(loaded) == 7
    found = [[row[f"negative_{i}"] for i in range(1, 5)] for row in loaded]
    assert found[0][:2] == ["Wrong", "other"]
    for random in (found[0][2:], *found[1:3]):  # no answer to a question that is the same in another case
        assert set(random) <= {f"filler {i}" for i in range(4)}


def texts_of(dataset, rows) -> list[str]:
    return [text for row in rows for text in dataset[row].values()]


def numbered(name: str, rows: int, different: int | None = None) -> Dataset:
    """Pairs; every anchor comes again after `different` rows."""
    different = different or rows
    return Dataset.from_dict(
        {
            "anchor": [f"{name} question {i % different}" for i in range(rows)],
            "positive": [f"{name} answer {i}" for i in range(rows)],
        }
    )


SOURCES = {"a": numbered("a", 90), "b": numbered("b", 40, different=13), "c": numbered("c", 30)}
WEIGHTS = {"a": 0.5, "b": 1.0, "c": 2.0}


def source_batches(**changes) -> SourceBatches:
    return SourceBatches(SOURCES, WEIGHTS, **{"size": 8, "seed": 3, **changes})


def test_batches_have_one_source_and_no_text_twice():
    batches, counts = source_batches(), Counter()
    for drawn in itertools.islice(batches, 1000):
        texts = texts_of(SOURCES[drawn.source], drawn.rows)
        assert len(drawn.rows) == 8
        assert len(set(texts)) == 16
        counts[drawn.source] += 1
    for name, share in {"a": 45 / 145, "b": 40 / 145, "c": 60 / 145}.items():  # size times weight
        assert counts[name] == pytest.approx(1000 * share, abs=4 * math.sqrt(1000 * share * (1 - share)))
    heavier = SourceBatches(SOURCES, dict.fromkeys(SOURCES, 7.0), size=8, seed=3)
    assert batches.per_epoch == heavier.per_epoch == 160 // 8  # weights do not change how long an epoch is


def test_negatives_may_be_shared_but_are_no_other_rows_anchor_or_positive():
    """Mined from 12 passages, most negatives of a row are negatives or positives of others."""
    rows = [
        {"anchor": f"q{i}", "positive": f"p{i}", **{f"negative_{n}": f"p{(i + 3 * n) % 12}" for n in (1, 2)}}
        for i in range(12)
    ] + [{"anchor": f"r{i}", "positive": f"s{i}", "negative_1": "u", "negative_2": "t"} for i in range(12)]
    batches = SourceBatches({"mined": Dataset.from_list(rows)}, {"mined": 1.0}, size=6, seed=3)
    shared = 0
    for drawn in itertools.islice(batches, 50):
        chosen = [rows[row] for row in drawn.rows]
        once = [row[column] for row in chosen for column in ("anchor", "positive")]
        negatives = [row[column] for row in chosen for column in ("negative_1", "negative_2")]
        assert len(set(once)) == 12
        assert set(once).isdisjoint(negatives)
        shared += len(negatives) - len(set(negatives))
    assert shared > 100


def test_texts_that_differ_in_case_and_whitespace_alone_are_one_as_in_the_preparation():
    rows = [{"anchor": f"Question  {i}", "positive": f"Answer {i}\n"} for i in range(8)]
    rows += [{"anchor": f"question {i} ", "positive": f"other answer {i}"} for i in range(8)]
    rows += [{"anchor": f"other question {i}", "positive": f"ANSWER {i}"} for i in range(8)]
    batches, copies = SourceBatches({"a": Dataset.from_list(rows)}, {"a": 1.0}, size=8, seed=3), 0
    for drawn in itertools.islice(batches, 30):
        keys = [pair_key(rows[row]["anchor"], rows[row]["positive"]).split("\n") for row in drawn.rows]
        assert len(set(itertools.chain(*keys))) == 16
        copies += sum(row < 8 for row in drawn.rows)
    assert copies > 0


def test_a_pass_reads_every_row_once_in_an_order_of_its_own():
    batches = SourceBatches({"a": SOURCES["a"]}, {"a": 1.0}, size=8, seed=3)
    first = [row for drawn in itertools.islice(batches, 11) for row in drawn.rows]
    second = [row for drawn in itertools.islice(batches, 11) for row in drawn.rows]
    assert len(set(first)) == len(first) == 88  # of 90: the rest makes no batch
    assert len(set(second)) == len(second) == 88
    assert first != second
    # Rows that had to wait are not lost: 40 rows with 13 anchors, each of them 3 or 4 times.
    batches = SourceBatches({"b": SOURCES["b"]}, {"b": 1.0}, size=8, seed=3)
    rows = [row for drawn in itertools.islice(batches, 4) for row in drawn.rows]
    assert len(set(rows)) == 32


def test_batches_go_on_from_any_place():
    batches = source_batches()
    drawn = list(itertools.islice(batches, 60))
    assert drawn == list(itertools.islice(source_batches(), 60))
    assert drawn[:10] != list(itertools.islice(source_batches(seed=4), 10))
    for place in (1, 17, 43):
        resumed = source_batches(place=json.loads(json.dumps(drawn[place - 1].place)))
        assert list(itertools.islice(resumed, 60 - place)) == drawn[place:]


def test_the_rows_of_all_processes_are_one_batch():
    offsets = {"a": 0, "b": 90, "c": 130}
    epochs = [
        list(ProcessBatches(source_batches(), offsets, reader=Reader(rank, 4), per_epoch=12)) for rank in range(4)
    ]
    whole = list(itertools.islice(source_batches(), 12))
    for drawn, *parts in zip(whole, *epochs, strict=True):
        assert all(len(part) == 2 for part in parts)
        assert [row for part in parts for row in part] == [offsets[drawn.source] + row for row in drawn.rows]


def test_what_was_fetched_ahead_is_not_taken_for_trained_on():
    reader, per_epoch = Reader(0, 1), 10
    offsets = {"a": 0, "b": 90, "c": 130}
    sampler = ProcessBatches(source_batches(), offsets, reader=reader, per_epoch=per_epoch, total=25)
    epoch = list(sampler)  # a loader with workers has fetched all of it
    place = [sampler.taken(number).place for number in range(1, 5)][-1]
    resumed = ProcessBatches(source_batches(place=place), offsets, reader=reader, per_epoch=per_epoch, total=25)
    assert list(resumed) == epoch[4:]
    assert [len(list(resumed)), len(list(resumed)), len(list(resumed))] == [10, 5, 0]  # epochs stay where they were


def test_batches_are_counted_in_the_steps_of_this_run():
    """Four steps of two batches are four batches of a run whose steps have one."""
    place = [drawn.place for drawn in itertools.islice(source_batches(), 8)][-1]
    options = {"reader": Reader(0, 1), "per_epoch": 10, "total": 20, "counted": 4}
    sampler = ProcessBatches(source_batches(place=place), {"a": 0, "b": 90, "c": 130}, **options)
    assert [len(list(sampler)) for _ in range(3)] == [6, 10, 0]
    assert sampler.taken(9).place["batches"] == 9


@pytest.mark.parametrize("seed", range(3))
def test_a_pass_without_a_batch_is_not_the_end(seed):
    """40 questions by 40 answers in 90 rows: whether a pass has 28 without a clash depends on its order."""
    generator = np.random.default_rng(0)
    questions, answers = generator.integers(40, size=(2, 90)).tolist()
    rows = [{"anchor": f"q{q}", "positive": f"a{a}"} for q, a in zip(questions, answers, strict=True)]
    batches = SourceBatches({"a": Dataset.from_list(rows)}, {"a": 1.0}, size=28, seed=seed)
    visits = [batches.draw().place["cursors"]["a"]["visit"] for _ in range(20)]
    assert max(np.diff(visits)) > 1


def test_a_place_in_sources_of_other_sizes_is_refused():
    place = source_batches().draw().place
    smaller = {**SOURCES, "a": SOURCES["a"].select(range(50))}
    with pytest.raises(RecipeError, match=r"the sources had .*'a': 90.* now .*'a': 50"):
        SourceBatches(smaller, WEIGHTS, size=8, seed=3, place=place)
    turned = dict(reversed(SOURCES.items()))
    with pytest.raises(RecipeError, match="no longer what they were"):
        SourceBatches(turned, WEIGHTS, size=8, seed=3, place=place)


def test_a_source_that_makes_no_batch_is_named():
    with pytest.raises(RecipeError, match=r"source b: a batch needs 16 rows .* its 40 rows gave 13"):
        source_batches(size=16)
    with pytest.raises(RecipeError, match=r"source c: .* its 30 rows gave 30"):
        SourceBatches({"c": SOURCES["c"]}, WEIGHTS, size=31, seed=0)


def test_anchors_that_differ_in_case_alone_are_on_one_side(folder):
    anchors = [f"Question {number}" for number in range(200)]
    rows = [{"anchor": text, "positive": "x"} for anchor in anchors for text in (anchor, f" {anchor.upper()} ")]
    config = recipe(folder, sources=[Source(name="a", heldout_share=0.3)])
    training, heldout = split_heldout(DatasetDict(a=Dataset.from_list(rows)), config)
    sides = [{pair_key(text, "") for text in side["a"]["anchor"]} for side in (training, heldout)]
    assert sides[0].isdisjoint(sides[1])
    queries, _, relevant = retrieval_set(heldout["a"], training["a"], queries=1000, corpus=1000)
    assert len(queries) == len(relevant) == len(heldout["a"]) / 2


def test_anchors_are_held_out_as_a_whole(folder):
    config = recipe(folder, sources=[Source(name="b", heldout_share=0.3), Source(name="a")])
    training, heldout = split_heldout(DatasetDict(b=SOURCES["b"], a=SOURCES["a"]), config)
    assert list(heldout) == ["b"]
    assert training["a"].to_dict() == SOURCES["a"].to_dict()
    sides = [set(side["b"]["anchor"]) for side in (training, heldout)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 13
    assert len(training["b"]) + len(heldout["b"]) == 40
    with pytest.raises(RecipeError, match=r"source b: heldout_share=1e-09 takes 0 of its 40 rows"):
        split_heldout(DatasetDict(b=SOURCES["b"]), recipe(folder, sources=[Source(name="b", heldout_share=1e-9)]))


def test_the_held_out_are_searched_among_all():
    heldout, training = SOURCES["b"].select(range(20)), SOURCES["b"].select(range(20, 40))
    queries, corpus, relevant = retrieval_set(heldout, training, queries=5, corpus=30)
    assert list(queries.values()) == [f"b question {i}" for i in range(5)]
    assert len(corpus) == len(set(corpus.values())) == 30
    for query, found in relevant.items():
        number = int(queries[query].split()[-1])
        expected = {f"b answer {i}" for i in range(20) if i % 13 == number}
        assert {corpus[document] for document in found} == expected


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables_are_read_as_text(folder, tmp_path, suffix, separator):
    rows = [["question", "answer"], ["What is missing?", "NA"], ["A, b?", 'say "c"\nand d'], ["", "nothing"]]
    with open(tmp_path / f"mine{suffix}", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    sources = [Source(name="mine", path=f"mine{suffix}", anchor="question", positive="answer")]
    found = load_sources(recipe(folder, data_dir=str(tmp_path), sources=sources))["mine"]
    assert [list(row.values()) for row in found] == rows[1:3]


def test_useless_pairs_are_dropped_and_an_empty_source_is_an_error(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"query": "a", "positive": "b"}\n{"query": "same", "positive": "same"}\n{"query": " ", "positive": "c"}\n'
    )
    sources = [Source(name="p", path="p.jsonl")]
    assert len(load_sources(recipe(folder, data_dir=str(tmp_path), sources=sources))["p"]) == 1
    (tmp_path / "p.jsonl").write_text('{"query": "same", "positive": "same"}\n')
    with pytest.raises(RecipeError, match="source p: all pairs are empty"):
        load_sources(recipe(folder, data_dir=str(tmp_path), sources=sources))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"anchor": "question"}, "source x: no column 'question'; it has query, positive"),
        ({"weight": 0.0}, "source x: weight=0.0"),
        ({"anchor": "positive"}, "source x: anchor and positive are the same column"),
        ({"heldout_share": 1.0}, "source x: heldout_share=1.0"),
    ],
)
def test_wrong_sources_are_named(folder, source, message):
    with pytest.raises(RecipeError, match=message):
        load_sources(recipe(folder, sources=[Source(name="x", path="pairs.jsonl", **source)]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "query,positive\nwhat is 6 x 7?,42\n", r"'positive' of row 0 is 42 \(int\), not a text"),
        ("x.csv", "query,positive\na,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3"),
        ("x.jsonl", '{"query": "a", "positive": ["b"]}\n', r"'positive' of row 0 is \['b'\] \(list\), not a text"),
        ("x.jsonl", '{"query": "a", "positive": "b"}\n{"query": \n', "JSON parse error"),
        (
            "x.jsonl",
            '{"query": "a", "positive": "b", "negatives": [["c"]]}\n',
            "of row 0 holds something else than text",
        ),
        ("x.jsonl", '{"query": "a", "positive": "b", "negative": "c"}\n', "no column 'negatives'"),
    ],
)
def test_records_that_are_no_text_are_named(folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    sources = [Source(name="mine", path=name)]
    config = recipe(folder, data_dir=str(tmp_path), sources=sources, num_negatives=int("negative" in content))
    with pytest.raises(RecipeError, match=message) as error:
        load_sources(config)
    assert str(error.value).startswith("source mine: ")


def test_another_model_is_refused(tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="not a JinaBERT"):
        load_model(recipe(tmp_path))
    with pytest.raises(RecipeError, match="no-such-model"):
        load_model(recipe("no-such-model"))
