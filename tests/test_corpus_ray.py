"""Corpus preparation on Ray, for real: the shards and the report are those of the local executor."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpus_data import recipe, written_corpus  # noqa: F401  pytest finds the fixture by name

from training import corpus
from training.corpus_recipe import Executor


def shards(output: Path) -> dict[str, list]:
    return {
        str(path.relative_to(output)): pq.read_table(path).to_pylist()
        for path in sorted((output / "tokens").rglob("*.parquet"))
    }


@pytest.mark.slow
def test_ray_gives_what_one_machine_gives(data, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    corpus.prepare(recipe(data, tmp_path / "local"))
    options = {"mem_per_cpu_gb": 1}
    try:
        corpus.prepare(
            recipe(data, tmp_path / "ray", executor=Executor(kind="ray", tasks=3, workers=2, options=options))
        )
    finally:
        ray.shutdown()
    expected, found = (shards(tmp_path / name) for name in ("local", "ray"))
    assert len(expected) > 6
    assert found == expected
    steps = [json.loads((tmp_path / name / "report.json").read_text())["steps"] for name in ("local", "ray")]
    assert steps[0] == steps[1]
