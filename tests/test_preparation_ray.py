"""Preparation of a corpus and of pairs on Ray, for real: what comes out is what the local executor gives."""

import json
from pathlib import Path

import corpus_data
import pair_data
import pyarrow.parquet as pq
import pytest
from corpus_data import written_corpus  # noqa: F401  pytest finds the fixture by name

from training import corpus, pair_preparation
from training.corpus_recipe import Executor

ON_RAY = Executor(kind="ray", tasks=3, workers=2, options={"mem_per_cpu_gb": 1})


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    yield
    ray.shutdown()


def files(output: Path, folder: str) -> dict[str, list]:
    """The rows of every parquet file of a folder."""
    return {
        str(path.relative_to(output)): pq.read_table(path).to_pylist()
        for path in sorted((output / folder).rglob("*.parquet"))
    }


def steps(output: Path) -> list:
    return json.loads((output / "report.json").read_text())["steps"]


def assert_alike(prepare, recipe, data: Path, folder: str, root: Path):
    prepare(recipe(data, root / "local"))
    prepare(recipe(data, root / "ray", executor=ON_RAY))
    expected = files(root / "local", folder)
    assert len(expected) > 3
    assert files(root / "ray", folder) == expected
    assert steps(root / "ray") == steps(root / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_corpus(data, tmp_path):
    assert_alike(corpus.prepare, corpus_data.recipe, data, "tokens", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_pairs(tmp_path):
    data = pair_data.write(tmp_path / "sets", pair_data.ROWS)
    assert_alike(pair_preparation.prepare, pair_data.recipe, data, "pairs", tmp_path)
