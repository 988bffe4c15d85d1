"""Losses against a slow float64 reference of the paper's formulas, and the loading of pairs and negatives."""

import pytest
import torch
from conftest import REPOSITORY, tiny_config
from torch.nn.functional import normalize

from modeling_jina_bert import JinaBertModel
from training.contrastive import build_loss, load_model, load_sources
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


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize("num_negatives", [0, 15])
def test_the_loss_is_half_of_the_paper(folder, num_negatives, mini_batch_size):
    config = recipe(folder, num_negatives=num_negatives, mini_batch_size=mini_batch_size)
    model = load_model(config).double()
    rows = load_sources(config)["facts"].select(range(7))
    texts = [rows["anchor"][:], rows["positive"][:]]
    texts += [rows[f"negative_{i}"][:] for i in range(1, num_negatives + 1)]
    features = [
        model.preprocess(column) if hasattr(model, "preprocess") else model.tokenize(column) for column in texts
    ]

    loss = build_loss(model, config)(features, torch.empty(0))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    embeddings = [model(dict(feature))["sentence_embedding"] for feature in features]
    expected = paper_loss(embeddings[0], embeddings[1], embeddings[2:])
    (expected / 2).backward()

    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-9)
    assert gradients
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)


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


def test_weights_multiply_rows(folder):
    counts = {}
    for weight in (1.0, 0.5, 2.5):
        sources = [Source(name="facts", path="pairs.jsonl", weight=weight)]
        counts[weight] = len(load_sources(recipe(folder, sources=sources))["facts"])
    assert counts == {1.0: 140, 0.5: 70, 2.5: 350}


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
        ({"path": "pairs.jsonl", "anchor": "question"}, "no column 'question'"),
        ({"path": "pairs.jsonl", "weight": 0.0}, "weight=0.0"),
    ],
)
def test_wrong_sources_are_named(folder, source, message):
    with pytest.raises(RecipeError, match=message):
        load_sources(recipe(folder, sources=[Source(name="x", **source)]))


def test_another_model_is_refused(tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="not a JinaBERT"):
        load_model(recipe(tmp_path))
    with pytest.raises(RecipeError, match="no-such-model"):
        load_model(recipe("no-such-model"))
