"""Laws of masked-language-model accuracy by length: every length predicts the same masked tokens, masked as in
training; scores equal the dense ones of the models themselves; extended positions are those written by hand; a record
is computed once; a wrong input ends with one line that names it.
"""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import zstandard
from conftest import REPOSITORY, SHIPPED, tiny_config
from test_attention import LargestTensor
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, DistilBertConfig, DistilBertForMaskedLM

from evaluation import mlm, mlm_models
from evaluation.mlm_models import extended_positions, load_masked_lm, score_text
from evaluation.mlm_texts import (
    MaskedText,
    context_free_scores,
    mask_words,
    masked_texts,
    shuffled,
    vocabulary_of,
    windows,
)
from modeling_jina_bert import JinaBertForMaskedLM
from modeling_jina_bert.masking import IGNORED, WordPieces
from training.masking import WholeWordMaskingCollator

TABLE = 33  # positions of the BERT
LENGTHS = [16, 33, 64, 130]
ROWS = [json.loads(line) for line in (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()]


def write_rows(path, texts: list[str]):
    path.write_bytes(zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def bert(**changes) -> BertForMaskedLM:
    """A 2-layer BERT; the wide initialisation makes the positions matter."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(1)
    config = {"vocab_size": 30528, "max_position_embeddings": TABLE, "initializer_range": 0.2, **shape, **changes}
    return BertForMaskedLM(BertConfig(**config)).eval()


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return vocabulary_of(tokenizer, "tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Random models with their tokenizer: name -> folder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {"jina": JinaBertForMaskedLM(tiny_config(vocab_size=30528, hidden_size=32)), "bert": bert()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A short document, and five long ones."""
    texts = ["Too short.", *(row["text"] * 2 for row in ROWS[:5])]
    return write_rows(tmp_path_factory.mktemp("data") / "long.jsonl.zst", texts)


@pytest.fixture(scope="module")
def text(data, tokenizer, vocabulary) -> MaskedText:
    """One document of 128 tokens, half of it masked."""
    options = {"tokens": 128, "documents": 1, "probability": 0.5, "seed": 3}
    return masked_texts([data], tokenizer, vocabulary=vocabulary, **options)[0]


# Texts and masks


def test_words_are_masked_as_in_training(tokenizer, vocabulary):
    targets = 0
    for row in ROWS[:8]:
        original = torch.tensor(tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"])
        corrupted, chosen = mask_words(original, vocabulary, probability=0.3, seed=9)
        batch = WholeWordMaskingCollator(tokenizer, probability=0.3, seed=9)([{"input_ids": original.tolist()}])
        assert torch.equal(batch["input_ids"][0], corrupted)
        assert torch.equal(batch["labels"][0], original.masked_fill(~chosen, IGNORED))
        targets += int(chosen.sum())
    assert targets > 500


@pytest.mark.parametrize("length", [3, 7, 52, 65, 102, 129, 130])
def test_every_length_predicts_the_same_tokens_once(vocabulary, length):
    """The ids are places, so a label says which token is predicted, and where it stands."""
    tokens = 128
    targets = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) < 0.4
    place = 2000 + torch.arange(tokens)
    corrupted = place.masked_fill(targets, vocabulary.pieces.mask)
    ids, labels = windows(MaskedText("here:1", place, corrupted, targets), length, vocabulary)
    assert ids.shape == labels.shape == (math.ceil(tokens / (length - 2)), length)
    assert (ids[:, 0] == vocabulary.cls).all()
    assert (ids[:, -1] == vocabulary.sep).all()
    assert sorted(labels[labels != IGNORED].tolist()) == place[targets].tolist()
    assert (ids[labels != IGNORED] == vocabulary.pieces.mask).all()
    for row, wanted in zip(ids[:, 1:-1], labels[:, 1:-1], strict=True):
        held = torch.where(wanted != IGNORED, wanted, row)
        known = held != vocabulary.pieces.mask
        assert len((held - torch.arange(length - 2))[known].unique()) == 1  # consecutive tokens of the document


def test_documents_are_taken_in_turn_from_the_files(tmp_path, tokenizer, vocabulary):
    first = write_rows(tmp_path / "a.jsonl.zst", ["one " * 20, "two " * 20, "three " * 20])
    second = write_rows(tmp_path / "b.jsonl.zst", ["short", "four " * 20])
    options = {"vocabulary": vocabulary, "tokens": 20, "probability": 0.3, "seed": 1}
    texts = masked_texts([first, second], tokenizer, documents=3, **options)
    assert [x.place for x in texts] == [f"{first}:1", f"{first}:2", f"{second}:2"]
    assert len(masked_texts([first, second], tokenizer, documents=9, **options)) == 4


# Positions


def test_interpolated_and_repeated_positions_by_hand():
    table = torch.randn(7, 3, dtype=torch.float64)
    steps = torch.arange(7, dtype=torch.float64).unsqueeze(1)
    for length in (8, 13, 100):
        positions = np.arange(length) * 6 / (length - 1)
        expected = np.stack([np.interp(positions, np.arange(7), column) for column in table.T.numpy()], axis=1)
        found = extended_positions(table, length, positions="interpolated")
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
        torch.testing.assert_close(found[[0, -1]], table[[0, -1]])
        assert (extended_positions(steps, length, positions="interpolated").diff(dim=0) > 0).all()
        repeated = extended_positions(table, length, positions="repeated")
        assert all(torch.equal(repeated[p], table[p % 7]) for p in range(length))
    for positions in ("table", "interpolated", "repeated"):
        torch.testing.assert_close(extended_positions(table, 7, positions=positions), table)
    assert torch.equal(extended_positions(table, 4, positions="table"), table[:4])
    with pytest.raises(ValueError, match="8 tokens"):
        extended_positions(table, 8, positions="table")


# Scores


def dense_score(model, text: MaskedText, length: int, vocabulary) -> tuple[int, int, float]:
    """Targets, right predictions and summed loss from all logits of the model itself."""
    ids, labels = windows(text, length, vocabulary)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    wanted = labels != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[wanted].double(), labels[wanted], reduction="sum")
    return int(wanted.sum()), int((logits.argmax(-1) == labels)[wanted].sum()), float(loss)


def with_table(model: BertForMaskedLM, table: torch.Tensor) -> BertForMaskedLM:
    """transformers' own BERT of as many positions as the table has rows."""
    larger = bert(max_position_embeddings=len(table))
    weights = model.state_dict() | {"bert.embeddings.position_embeddings.weight": table}
    larger.load_state_dict(weights)
    return larger


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["jina", "bert"])
def test_scores_equal_the_dense_ones(monkeypatch, folders, text, vocabulary, name, length):
    monkeypatch.setattr(mlm_models, "LOGITS_BLOCK", 7)
    monkeypatch.setattr(mlm_models, "TOKENS_PER_BATCH", 100)
    masked_lm = load_masked_lm(name, str(folders[name]))
    # A random model is never right: its own predictions are made the truth at every second token.
    ids, labels = windows(dataclasses.replace(text, original=torch.arange(128)), length, vocabulary)
    places, even = labels[labels != IGNORED], torch.arange(128) % 2 == 0
    model = {"jina": JinaBertForMaskedLM, "bert": BertForMaskedLM}[name].from_pretrained(folders[name])
    table = masked_lm.position_table
    for positions in masked_lm.positions_for(length):
        if positions in ("interpolated", "repeated"):
            rows = np.arange(length) % TABLE if positions == "repeated" else np.arange(length) * 32 / (length - 1)
            columns = [np.interp(rows, np.arange(TABLE), column) for column in table.detach().T.numpy()]
            model = with_table(model, torch.tensor(np.stack(columns, axis=1), dtype=torch.float32))
        with torch.no_grad():
            predicted = model(input_ids=ids).logits.argmax(-1)[labels != IGNORED]
        guesses = torch.zeros(128, dtype=torch.int64).index_put((places,), predicted)
        asked = dataclasses.replace(text, original=torch.where(text.targets & even, guesses, text.original))
        expected = dense_score(model, asked, length, vocabulary)
        found = score_text(masked_lm, asked, length=length, positions=positions)
        assert (found.targets, found.correct) == expected[:2]
        assert found.targets > 40
        assert 10 < found.correct < found.targets
        assert found.loss == pytest.approx(expected[2], rel=1e-5)


def test_two_ways_of_extension_differ_and_so_does_no_extension(folders, text):
    masked_lm = load_masked_lm("bert", str(folders["bert"]))
    assert [masked_lm.positions_for(n) for n in (33, 34)] == [("table",), ("interpolated", "repeated")]
    losses = {x: score_text(masked_lm, text, length=64, positions=x).loss for x in ("interpolated", "repeated")}
    assert abs(losses["interpolated"] - losses["repeated"]) > 1
    again = score_text(masked_lm, text, length=33, positions="table")
    assert again == score_text(load_masked_lm("bert", str(folders["bert"])), text, length=33, positions="table")


def test_accuracy_by_hand(tmp_path, tokenizer, vocabulary):
    """A BERT that answers "the" everywhere: its head has a bias alone."""
    model, the = bert(), tokenizer.convert_tokens_to_ids("the")
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight.zero_()
        model.cls.predictions.transform.LayerNorm.bias.zero_()
        model.cls.predictions.bias.zero_()[the] = 5.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    original = torch.tensor(tokenizer("the cat saw the dog and the cow", add_special_tokens=False)["input_ids"])
    targets = torch.tensor([True, True, False, True, False, True, False, False])
    text = MaskedText("here:1", original, original.masked_fill(targets, vocabulary.pieces.mask), targets)
    for length, positions in ((5, "table"), (10, "table"), (10, "repeated")):
        score = score_text(load_masked_lm("the", str(tmp_path)), text, length=length, positions=positions)
        assert (score.targets, score.correct) == (4, 2)  # the, cat, the, and
        normaliser = math.log(math.exp(5) + 30527)
        assert score.loss == pytest.approx(2 * (normaliser - 5) + 2 * normaliser, rel=1e-5)


def test_shuffled_words_are_the_same_words_around_the_same_targets(text):
    found = shuffled(text, 50)
    assert torch.equal(found.targets, text.targets)
    assert torch.equal(found.original, text.original)
    assert torch.equal(found.corrupted[text.targets], text.corrupted[text.targets])
    for before, after in zip(text.corrupted.split(50), found.corrupted.split(50), strict=True):
        assert torch.equal(before.sort().values, after.sort().values)
        assert not torch.equal(before, after)
    assert torch.equal(shuffled(text, 50).corrupted, found.corrupted)


def test_shuffled_words_change_what_a_model_scores(folders, text):
    masked_lm = load_masked_lm("bert", str(folders["bert"]))
    found = {x: mlm.score_documents(masked_lm, [text], 33, x)["metrics"]["loss"] for x in ("table", "shuffled")}
    by_hand = score_text(masked_lm, shuffled(text, 31), length=33, positions="table")
    assert found["shuffled"] == pytest.approx(by_hand.loss / by_hand.targets, rel=1e-9)
    assert found["shuffled"] != pytest.approx(found["table"], rel=1e-4)


def test_what_ignores_the_context_by_hand():
    """Of the targets 7 7 5 7 and 7 9 the 7 is four sixths. Each of 9 ordinary tokens is drawn with 1/9 of the
    probability that one stays; 5 is likely the original, 4, which is no target, cannot be."""
    original = torch.tensor([[7, 7, 5, 7, 1], [7, 9, 9, 9, 9]])
    shown = torch.tensor([[0, 5, 5, 4, 1], [0, 0, 9, 9, 9]])  # 0 is [MASK]; 7 became 5, 5 stayed, 7 became 4
    targets = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    pieces = WordPieces(torch.zeros(10, dtype=torch.bool), torch.arange(10) == 0, mask=0)
    texts = [MaskedText("here:1", *row) for row in zip(original, shown, targets, strict=True)]
    first, second = context_free_scores(texts, pieces)
    assert (first[:2], second[:2]) == ((4, 3), (2, 1))
    shown_as_5 = 1 / 6 + 1 / 9
    likelihoods = [4 / 6, 4 / 6 / 9 / shown_as_5, 1 / 6 * (1 + 1 / 9) / shown_as_5, 4 / 6]
    assert first[2] == pytest.approx(-sum(map(math.log, likelihoods)))
    assert second[2] == pytest.approx(math.log(6 / 4) + math.log(6))


@pytest.mark.parametrize("name", ["jina", "bert"])
def test_memory_is_linear_in_the_length(monkeypatch, folders, data, tokenizer, vocabulary, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the recorder is one thread's
    monkeypatch.setattr(mlm_models, "LOGITS_BLOCK", 32)
    length = 2048
    masked_lm = load_masked_lm(name, str(folders[name]))
    original = torch.randint(2000, 3000, (length - 2,), generator=torch.Generator().manual_seed(1))
    corrupted, targets = mask_words(original, vocabulary, probability=0.3, seed=1)
    text = MaskedText("here:1", original, corrupted, targets)
    with LargestTensor() as recorder:
        score_text(masked_lm, text, length=length, positions=masked_lm.positions_for(length)[0])
    assert int(targets.sum()) > 400
    assert recorder.bytes <= max(32, TABLE) * 30528 * 4 < length * length * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["jina", "bert"])
def test_a_gpu_gives_the_same_scores(folders, text, name):
    scores = []
    for device in ("cpu", "cuda"):
        masked_lm = load_masked_lm(name, str(folders[name]), device=device)
        positions = masked_lm.positions_for(130)[0]
        scores.append(score_text(masked_lm, text, length=130, positions=positions))
    assert scores[0].targets == scores[1].targets
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-3)


# The command


def command(folders, data, tmp_path, *more: str) -> list[str]:
    models = ["--model", f"Jina={folders['jina']}", "--model", f"BERT={folders['bert']}"]
    sizes = ["--lengths", *map(str, LENGTHS), "--documents", "3", "--trained-length", "33"]
    return [*models, "--data", str(data), *sizes, "--output", str(tmp_path / "results.json"), *more]


def test_a_run_from_the_command_line_is_complete_and_resumes(folders, data, tmp_path, capsys):
    output, plot, table = (tmp_path / name for name in ("results.json", "figure.png", "table.md"))
    mlm.main(command(folders, data, tmp_path, "--plot", str(plot), "--markdown", str(table)))
    records = json.loads(output.read_text())["records"]
    places = [(x["model"], x["length"], x["positions"]) for x in records]
    assert places == [
        ("Jina", 16, "alibi"),
        ("Jina", 33, "alibi"),
        ("Jina", 33, "shuffled"),
        *(("Jina", length, "alibi") for length in (64, 130)),
        ("BERT", 16, "table"),
        ("BERT", 33, "table"),
        ("BERT", 33, "shuffled"),
        *(("BERT", length, way) for length in (64, 130) for way in ("interpolated", "repeated")),
        ("without context", 33, None),
    ]
    assert len({json.dumps([(y["place"], y["targets"]) for y in x["documents"]]) for x in records}) == 1
    assert len({x["settings"]["masks_sha256"] for x in records}) == 1
    assert len({x["settings"]["weights_sha256"] for x in records[:-1]}) == 2
    targets = records[0]["metrics"]["targets"]
    assert 0.2 * 3 * 128 < targets < 0.4 * 3 * 128
    assert all(x["metrics"]["loss"] > 3 and x["metrics"]["targets"] == targets for x in records)
    assert {"command", "environment"} <= set(records[0])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"the same {targets} masked tokens" in table.read_text()
    printed = capsys.readouterr().out.replace("\n", "")
    assert all(x in printed for x in ("BERT repeated", "BERT interpolated", "ratio", str(table)))

    # What is in the file is taken from there, under the model's present name, and one missing record is computed.
    for x in records:
        x["metrics"]["loss"] = 77.0
    mlm.write_records(output, [x for x in records if x["length"] != 64])
    renamed = [x.replace("Jina=", "Renamed=") for x in command(folders, data, tmp_path)]
    mlm.main(renamed)
    again = json.loads(output.read_text())["records"]
    assert {x["length"] for x in again if x["metrics"]["loss"] != 77.0} == {64}
    assert len(again) == len(records)
    assert "Renamed" in capsys.readouterr().out

    mlm.main(command(folders, data, tmp_path, "--seed", "43"))
    assert len(json.loads(output.read_text())["records"]) == 2 * len(records)


def test_a_retrained_model_is_scored_anew(folders, data, tmp_path, tokenizer):
    model = bert()
    settings = []
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        sizes = ["--lengths", "20", "--trained-length", "20", "--documents", "1"]
        mlm.main(
            ["--model", str(tmp_path / "model"), "--data", str(data), *sizes, "--output", str(tmp_path / "r.json")]
        )
        records = json.loads((tmp_path / "r.json").read_text())["records"]
        assert [x["positions"] for x in records if x["positions"] is None] == [None]  # the one without context
        settings.append([x["metrics"]["loss"] for x in records if x["positions"] == "table"])
        with torch.no_grad():
            model.cls.predictions.bias[1500] += 3
    assert [len(x) for x in settings] == [1, 2]
    assert settings[1][0] == settings[0][0] != settings[1][1]


def fails(capsys, argv: list[str]) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit) as error:
        mlm.main(argv)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lengths", "33", "100000"], r"no document has 99998 tokens, the longest has \d{3,5}; take"),
        (["--lengths", "16", "64"], "--trained-length 33: is not among --lengths"),
        (["--lengths", "2", "33"], "--lengths 2: the least is 3"),
        (["--documents", "0"], "--documents 0"),
        (["--mlm-probability", "1.5"], "--mlm-probability 1.5"),
        (["--data", "nowhere.jsonl.zst"], "nowhere.jsonl.zst: no such file"),
        (["--data", __file__], "not JSON"),
        (["--plot", "figure.xyz"], "is none of .png"),
        (["--output", "/nowhere/at/all.json"], "lies in none"),
        (["--model", "/nowhere/model"], "/nowhere/model: no such folder"),
        (["--model", "Jina=elsewhere"], "the name Jina is taken"),
        (["--lengths", "128", "--trained-length", "128"], r"--trained-length 128: BERT has \d+ positions"),
    ],
)
def test_wrong_arguments_are_named(folders, data, tmp_path, capsys, change, message):
    assert re.search(message, fails(capsys, [*command(folders, data, tmp_path), *change]))
    assert not (tmp_path / "results.json").exists()


def test_another_programs_output_is_kept(folders, data, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"records": [{"model": "x"}]}')
    assert "holds no results of this program" in fails(capsys, command(folders, data, tmp_path))
    assert (tmp_path / "results.json").read_text() == '{"records": [{"model": "x"}]}'


def test_models_that_cannot_be_scored_are_named(data, tmp_path, tokenizer, capsys):
    def refused(folder) -> str:
        sizes = ["--lengths", "20", "--trained-length", "20"]
        argv = ["--model", str(folder), "--data", str(data), *sizes, "--output", str(tmp_path / "r.json")]
        return fails(capsys, argv)

    def saved(name: str, model, its_tokenizer=tokenizer):
        model.save_pretrained(tmp_path / name)
        if its_tokenizer is not None:
            its_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    assert "no masked language model, it lacks cls.predictions" in refused(SHIPPED)
    assert "30522 entries, the model 3000" in refused(saved("small", bert(vocab_size=3000)))
    assert "tokenizer" in refused(saved("no tokenizer", bert(), None))
    shape = {"vocab_size": 30528, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    distil = saved("distil", DistilBertForMaskedLM(DistilBertConfig(**shape)))
    assert "model_type 'distilbert'" in refused(distil)
    (tmp_path / "empty").mkdir()
    assert "no weights" in refused(tmp_path / "empty")

    pieces = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "##b": 6})
    pieces.mask_token = None
    assert "has no mask_token" in refused(saved("no mask", bert(), pieces))
    broken = bert()
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.bias[3] = float("nan")
    assert "the loss at 20 tokens is nan" in refused(saved("broken", broken))
    assert not (tmp_path / "r.json").exists()
