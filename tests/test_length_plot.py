"""Laws of accuracy by length: intervals are paired and deterministic, what is undefined is a dash."""

import pytest

from evaluation import length_plot


def record(model: str, length: int, correct: list[int], *, positions: str = "alibi", table: int | None = None) -> dict:
    rows = [{"place": f"d:{i}", "targets": 100, "correct": x, "loss": 200.0} for i, x in enumerate(correct)]
    settings = {"tokens": 998, "mlm_probability": 0.3, "masks_sha256": "0"}
    return {
        "model": model, "positions": positions, "position_table": table, "length": length, "settings": settings,
        "documents": rows, "metrics": {},
    }  # fmt: skip


RECORDS = [
    record("A", 512, [80, 40, 60, 20]),
    record("A", 1024, [40, 20, 30, 10]),
    record("B", 512, [80, 40, 60, 20], positions="table", table=512),
    record("B", 1024, [0, 0, 0, 0], positions="interpolated", table=512),
    record("B", 1024, [10, 60, 10, 10], positions="repeated", table=512),
]


def test_intervals_are_paired_and_deterministic():
    at_512, half, _, nothing, repeated = found = length_plot.points(RECORDS, 512)
    assert found == length_plot.points(RECORDS, 512)
    assert (at_512.accuracy, half.accuracy, at_512.loss) == (0.5, 0.25, 2.0)
    # 4 documents: between the mean of 4 times the worst and that of 4 times the best, 0.2 to 0.8.
    assert 0.2 <= at_512.interval[0] < 0.35
    assert 0.65 < at_512.interval[1] <= 0.8
    assert half.ratio_interval == (0.5, 0.5)  # half in every document: no doubt about the ratio
    assert (nothing.ratio, nothing.ratio_interval) == (0.0, (0.0, 0.0))
    assert repeated.ratio == 0.45
    assert repeated.ratio_interval[0] < 0.3 < 0.7 < repeated.ratio_interval[1]
    drawn = length_plot.resampled_documents(4)
    assert (drawn.sum(axis=1) == 4).all()
    assert drawn.mean(axis=0) == pytest.approx([1, 1, 1, 1], abs=0.05)


def test_what_is_undefined_is_a_dash():
    (alone,) = length_plot.points([record("A", 512, [50])], 512)
    assert (alone.accuracy, alone.ratio) == (0.5, 1.0)
    assert alone.interval is alone.ratio_interval is None
    never, _ = length_plot.points([record("A", 512, [0, 0]), record("A", 1024, [0, 1])], 512)
    assert never.ratio is never.ratio_interval is None
    header, rows = length_plot.table_rows([never, alone], 512)
    assert rows == [
        ["A", "512", "0.000", "0.000 to 0.000", "-", "-", "2.000"],
        ["A", "512", "0.500", "-", "1.000", "-", "2.000"],
    ]
    assert header[4] == "ratio to 512"


def test_the_figure_draws_every_system_from_where_its_positions_begin():
    lines = length_plot.curves(length_plot.points(RECORDS, 512))
    assert {system: [point.length for point in line] for system, line in lines.items()} == {
        "A": [512, 1024],
        "B": [512],
        "B interpolated": [512, 1024],
        "B repeated": [512, 1024],
    }
    assert lines["B repeated"][0].accuracy == 0.5
    (axis,) = length_plot.figure_of(RECORDS, 512).axes
    *curves, vertical = axis.lines
    assert [list(line.get_ydata()) for line in curves] == [[0.5, 0.25], [0.5], [0.5, 0.0], [0.5, 0.225]]
    assert len({line.get_color() for line in curves}) == len(axis.collections) == 4
    assert list(vertical.get_xdata()) == [512, 512]
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["512", "1,024"]


def test_references_are_single_points():
    """Shuffled words beside the model's own accuracy; what ignores the context, at whatever length, beside itself."""
    references = [
        record("A", 512, [20, 20, 30, 30], positions="shuffled"),
        record("without context", 256, [10, 10, 10, 10], positions=None),
    ]
    *_, shuffled, ignorant = found = length_plot.points([*RECORDS, *references], 512)
    assert (shuffled.system, shuffled.accuracy, shuffled.ratio) == ("A shuffled", 0.25, 0.5)
    assert (ignorant.system, ignorant.accuracy, ignorant.ratio) == ("without context", 0.1, 1.0)
    lines = length_plot.curves(found)
    assert {name: len(line) for name, line in lines.items()} == {
        "without context": 1, "A": 2, "B": 1, "A shuffled": 1, "B interpolated": 2, "B repeated": 2,
    }  # fmt: skip
    text = length_plot.caption([*RECORDS, *references])
    assert "Without context: the best answer" in text
    assert "Shuffled: what is not masked" in text
    assert "Shuffled" not in length_plot.caption(RECORDS)


def test_other_tokens_are_said():
    other = record("B", 512, [1, 2, 3, 4]) | {"settings": RECORDS[0]["settings"] | {"masks_sha256": "1"}}
    assert "different tokenizers" in length_plot.caption([RECORDS[0], other])
    text = length_plot.markdown(RECORDS, 512, command="python -m evaluation.mlm --x y")
    assert "different tokenizers" not in text
    assert "the same 400 masked tokens of 4 documents, the first 998 tokens of each" in text
    assert "python -m evaluation.mlm --x y\n" in text
    assert "B has 512 positions: for longer windows they are interpolated, or repeated." in text
    assert text.count("\n| ") == 6
