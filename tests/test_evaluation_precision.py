"""Half precision against float32 on real text: the figures are those of the vectors, and wrong input is named."""

import json

import numpy as np
import pytest
from conftest import REPOSITORY, SHIPPED

from evaluation.precision import agreement, compare, main
from evaluation.sets import RetrievalSet


def test_agreement_by_hand():
    # Two queries, three documents; the second query's first two documents change places.
    reference = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    other = reference.copy()
    other[3], other[4] = [0.6, 0.8], [0, 1]
    found = agreement(reference, other, queries=2, cutoff=1)
    assert found["cosine_min"] == pytest.approx(0.8)
    assert found["cosine_mean"] == pytest.approx((1 + 1 + 1 + 0.8 + 0.8) / 5)
    assert found["top_1"] == found["top_k_overlap"] == 0.5
    assert agreement(reference, other, queries=2, cutoff=3)["top_k_overlap"] == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_the_shipped_model(dtype):
    lines = (REPOSITORY / "tests" / "data" / "pairs.jsonl").read_text().splitlines()[:12]
    pairs = [json.loads(line) for line in lines]
    names = [str(i) for i in range(len(pairs))]
    dataset = RetrievalSet(
        "ir/mine",
        {name: pair["query"] for name, pair in zip(names, pairs, strict=True)},
        {name: pair["positive"] for name, pair in zip(names, pairs, strict=True)},
        {name: {name: 1} for name in names},
    )
    found = compare(str(SHIPPED), dataset, dtype)
    assert 0.99 < found["cosine_min"] < 1
    assert found["top_k_overlap"] > 0.9
    assert found["float32"]["ndcg_at_10"] == pytest.approx(found[dtype]["ndcg_at_10"], abs=0.1)


@pytest.mark.parametrize(("name", "message"), [("ir/nothing", "nothing"), ("STS", "no retrieval set")])
def test_wrong_sets_are_named(tmp_path, capsys, name, message):
    import zstandard

    folder = tmp_path / "eval" / "STS"
    folder.mkdir(parents=True)
    rows = '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "c", "score": 2}\n'
    (folder / "test.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    with pytest.raises(SystemExit) as error:
        main(["--model", str(SHIPPED), "--data", str(tmp_path), "--set", name])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
