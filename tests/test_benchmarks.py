"""Laws of the benchmark: the dense transcription computes our model; memory is measured right; whatever a worker does
is an answer; every system and length has a record, measured or with its reason; figures come from the JSON alone; what
is wrong with the input is one line and status 2. Nothing here depends on how fast anything is."""

import json
import sys

import pytest
import torch

from benchmarks import report, rounds, speed
from benchmarks.dense import DenseJinaBert
from benchmarks.machine import describe_machine
from benchmarks.results import check_machine, find_record, limit_below, new_results
from benchmarks.systems import SYSTEMS, System, missing, select
from benchmarks.torch_systems import jina_bert
from benchmarks.worker import status_of
from benchmarks.worker_process import WorkerProcess
from benchmarks.workloads import (
    CORPUS,
    MIX,
    SHAPES,
    Shape,
    make_batch,
    make_workload,
    operations,
    packed_batches,
    parse_length,
)

SHAPE = Shape(layers=2, hidden=96, heads=6, intermediate=128)


@pytest.fixture(autouse=True)
def one_thread():
    """These models are small: two threads only wait for each other, and for long beside a training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fused", [False, True])
def test_the_dense_transcription_is_our_model(fused):
    model = jina_bert(SHAPE)
    dense = DenseJinaBert(model, fused=fused)
    for lengths in ((7, 1, 33), (129, 5)):  # the second grows the bias
        input_ids, attention_mask = map(torch.from_numpy, make_batch(lengths))
        with torch.no_grad():
            expected = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            found = dense(input_ids, attention_mask)
        valid = attention_mask.bool()
        assert (found - expected)[valid].abs().max() < 1e-4
    dense.bias.zero_()  # guard: the comparison sees the bias
    assert (dense(input_ids, attention_mask) - expected)[valid].abs().max() > 1e-2


def test_all_systems_of_ours_have_the_same_weights():
    first, second = jina_bert(SHAPE).state_dict(), jina_bert(SHAPE, attention="eager", sparse=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["encoder.layer.0.attention.self.query.weight"].std().item() == pytest.approx(0.05, rel=0.05)


def test_batches():
    assert make_workload(2048, 4096).lengths == (2048, 2048)
    assert make_workload(32768, 4096).lengths == (32768,)
    mix = make_workload(MIX, 4096)
    assert mix == make_workload(MIX, 512)
    assert len(mix.lengths) == 64
    corpus = make_workload(CORPUS, 4096)
    assert sorted(length for batch in packed_batches(corpus.lengths) for length in batch) == sorted(corpus.lengths)
    assert max(sum(batch) for batch in packed_batches(corpus.lengths)) <= 16384
    assert packed_batches(mix.lengths) == [mix.lengths]
    assert min(mix.lengths) >= 8
    assert max(mix.lengths) <= 2048
    input_ids, attention_mask = make_batch(mix.lengths)
    assert attention_mask.sum(1).tolist() == list(mix.lengths)
    assert ((input_ids == 0) == (attention_mask == 0)).all()
    assert (attention_mask[:, :-1] >= attention_mask[:, 1:]).all()  # padding on the right


def test_operations_are_those_of_the_parameters():
    parameters = sum(p.numel() for name, p in jina_bert(SHAPE).encoder.named_parameters() if p.dim() == 2)
    assert operations(SHAPE, (3, 4)) == 2 * 7 * parameters + 4 * 2 * 96 * (9 + 16)


@pytest.fixture
def worker():
    process = WorkerProcess(threads=1)
    yield process
    process.end()


def test_a_worker_sees_the_memory_of_a_call(worker):
    arguments = {"system": "self-check", "shape": "tiny", "device": "cpu", "threads": 1, "graph": None}
    assert worker.ask("load", limit_s=60, **arguments)["status"] == "ok"
    assert worker.ask("prepare", limit_s=60, lengths=[4, 4])["status"] == "ok"
    for _ in range(3):  # the system prints in every call: that does not disturb the answers
        answer = worker.ask("call", limit_s=60)
        assert answer["status"] == "ok"
        assert answer["seconds"] > 0
        assert answer["others_cpu_seconds"] is None or answer["others_cpu_seconds"] > -0.1
        assert answer["peak_bytes"] is None or 60e6 < answer["peak_bytes"] < 100e6
    if sys.platform == "linux":
        assert answer["peak_bytes"] is not None


def test_errors_of_a_worker_are_answers(worker):
    answer = worker.ask("call", limit_s=60)  # nothing is loaded
    assert answer["status"] == "failed"
    assert "AttributeError" in answer["message"]
    assert worker.is_alive
    worker.process.kill()
    assert worker.ask("call", limit_s=60)["status"] == "out of memory"  # what a kill looks like
    assert not worker.is_alive


def test_a_worker_that_takes_too_long_is_ended(worker):
    answer = worker.ask("call", limit_s=0)
    assert answer == {"status": "time limit", "message": "call: no answer within 0 s"}
    assert not worker.is_alive


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", "out of memory"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out of memory"),
        ("RuntimeException: bad allocation; std::bad_alloc", "out of memory"),
        ("MemoryError: ", "out of memory"),
        ("ValueError: the allocation of heads is wrong", "failed"),
    ],
)
def test_out_of_memory_is_told_from_other_failures(message, status):
    assert status_of(message) == status


def test_what_is_not_installed_is_listed():
    status, message = missing(System("onnxruntime", "fp32", 8192, "", packages=("no_such_package",)), "cpu")
    assert status == "not installed"
    assert "pip install -e '.[benchmarks]'" in message
    assert all(system.device != "cuda" for system in select(None, "cpu").values())
    assert {"ours-flex-bf16", "ours-flash2-bf16", "dense-pytorch-fp32"} <= set(select(None, "cuda"))


MACHINE = {
    "cpu": "Abacus", "instruction_sets": [], "physical_cores": 1, "memory_bytes": None, "load_average": None,
    "versions": {"torch": "2.13.0", "openvino": None}, "git_commit": None, "git_changes": None,
}  # fmt: skip


def record(system, length, seconds, **changes):
    batch = {32: 4, 512: 2, "mix": 2}[length]
    plain = {
        "status": "ok",
        "message": None,
        "batch": batch,
        "tokens": 1000,
        "longest": {"mix": 90}.get(length, length),
    }
    figures = {"operations": 10**9, "run": 0, "peak_bytes": [2**20, 3 * 2**20], "reference_seconds": [1.0, 2.0]}
    figures |= {"others_cpu_seconds": [0.0, 0.0]}
    return {"system": system, "length": length, **plain, **figures, "seconds": seconds, **changes}


@pytest.fixture
def results():
    """Written by hand: one system whole, one that failed and was skipped, one that is not installed, a ceiling."""
    nothing = {"seconds": [], "reference_seconds": [], "peak_bytes": [], "others_cpu_seconds": []}
    listed = {"longest": 512, "description": "words"}
    shape = {"name": "tiny", "layers": 1, "hidden": 8, "heads": 1, "intermediate": 8}
    return {
        "format": 1,
        "settings": {
            "shape": shape, "device": "cpu", "threads": 1, "rounds": 2, "reference": "ours-sdpa-fp32",
            "initializer_range": 0.05, "mix": [10, 90],
        },
        "runs": [
            {"command": "run | me", "started": "now", "time_limit_s": 60, "peak_tflops": None, "machine": MACHINE}
        ],
        "systems": {
            "ours-sdpa-fp32": {"kind": "ours", "dtype": "fp32", **listed, "loading": {"loaded_bytes": 5 * 2**20}},
            "other": {"kind": "dense", "dtype": "fp32", **listed},
            "absent": {"kind": "openvino", "dtype": "device", **listed},
            "gemm-ceiling-fp32": {"kind": "ceiling", "dtype": "fp32", **listed},
        },
        "records": [
            record("ours-sdpa-fp32", 512, [1.0, 2.0], skipped_share=0.25),
            record("ours-sdpa-fp32", 32, [1.0, 2.0], skipped_share=0.0, peak_bytes=[None, None]),
            record("other", 32, [0.5, 0.5]),
            record("other", "mix", status="failed", message="bad | worse\nand more", **nothing),
            record("other", 512, status="skipped", message="tried up to 64 tokens", **nothing),
            *(record("absent", x, status="not installed", message="pip", **nothing) for x in (32, 512)),
            record("gemm-ceiling-fp32", 512, [0.75, 0.75], attention_seconds=0.25),
        ],
    }  # fmt: skip


def test_the_report_of_a_document_written_by_hand(results, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path = tmp_path / "hand.json"
    path.write_text(json.dumps(results))
    report.main([str(path)])
    text = path.with_suffix(".md").read_text()
    assert "| system | 32 x 4 | mix: 10-90 x 2 | 512 x 2 |" in text
    # 1000 tokens in the medians of [1, 2] and [0.5, 0.5] seconds; ratios of the rounds 1 / 0.5 and 2 / 0.5.
    assert "| ours-sdpa-fp32 | 667 (1.00) |  | 667 (1.00) |" in text
    assert "| other (fp32) | 2,000 (3.00) | failed | skipped |" in text
    assert "| absent (device) | not installed |  | not installed |" in text
    assert "| ours-sdpa-fp32 | - |  | 3 | 5 |" in text
    assert "| ours-sdpa-fp32 | 0.0% |  | 25.0% |" in text
    assert "| ours-sdpa-fp32 | - | - | 50% / 67% |" in text  # of 1000 / 0.75 and of 1000 / (0.75 + 0.25)
    assert "- other at mix: failed: bad | worse and more" in text
    assert "- absent at 32, 512: not installed: pip" in text
    assert "tried up to 64 tokens" in capsys.readouterr().out.replace("\n", " ")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_operations_a_second_on_a_gpu(results):
    results["settings"]["device"], results["runs"][0]["peak_tflops"] = "cuda", 0.002
    table = report.utilisation_table(results)
    assert table.rows[1][1] == "0.0 (100%)"  # 1e9 operations in 0.5 s
    assert [row[0] for row in table.rows] == ["ours-sdpa-fp32", "other (fp32)", "absent (device)"]


def test_a_disturbed_measurement_says_so(results):
    assert "DISTURBED" not in report.markdown(results)
    find_record(results, "other", 32)["others_cpu_seconds"] = [0.5, 0.25]  # in 1 s, 0.04 s of it rounding
    assert "up to 0.71 cores during the calls (other at 32)" in report.markdown(results)


def test_longer_texts_are_not_tried_after_a_limit(results):
    find_record(results, "other", 32)["status"] = "time limit"
    assert limit_below(results, "other", 512, 60) == "time limit at 32 tokens"
    assert limit_below(results, "other", 32, 60) is None
    assert limit_below(results, "other", 512, 600) is None  # more time than then
    find_record(results, "other", 32)["status"] = "ok"
    find_record(results, "other", "mix")["status"] = "out of memory"
    assert limit_below(results, "other", 512, 60) is None  # the mix is a large batch


def test_the_command_measures_reports_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    options = ["--shape", "tiny", "--lengths", "16", "--tokens", "64", "--rounds", "2", "--threads", "1"]
    options += ["--systems", "self-check", "ours-sdpa-fp32", "--output", str(tmp_path), "--cache", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_status:
        speed.main(options)
    assert exit_status.value.code == 0
    path = tmp_path / "speed-tiny-cpu.json"
    results = json.loads(path.read_text())
    assert results["settings"]["reference"] == "ours-sdpa-fp32"
    assert results["runs"][0]["machine"]["versions"]["torch"] == torch.__version__
    assert {record["system"] for record in results["records"]} == {"self-check", "ours-sdpa-fp32"}
    for measured in results["records"]:
        assert measured["status"] == "ok", measured["message"]
        assert len(measured["seconds"]) == len(measured["reference_seconds"]) == 2
    ours = find_record(results, "ours-sdpa-fp32", 16)
    assert ours["seconds"] == ours["reference_seconds"]
    assert ours["skipped_share"] == 0.0
    assert ours["operations"] == operations(SHAPES["tiny"], (16,) * 4)
    assert "| ours-sdpa-fp32 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()

    monkeypatch.setattr(rounds, "WorkerProcess", None)  # a resumed run has nothing to start
    with pytest.raises(SystemExit) as exit_status:
        speed.main([*options, "--resume"])
    assert exit_status.value.code == 0
    resumed = json.loads(path.read_text())
    assert resumed["records"] == results["records"]
    assert len(resumed["runs"]) == 2


def test_a_worker_that_keeps_memory_is_started_again_for_each_round(tmp_path, monkeypatch):
    started = []

    class Counted(WorkerProcess):
        def __init__(self, threads):
            started.append(self)
            super().__init__(threads)

    monkeypatch.setattr(rounds, "WorkerProcess", Counted)
    monkeypatch.setattr(rounds, "IDLE_SHARE", -1)  # however little it keeps
    monkeypatch.setattr(speed, "print_report", lambda results: None)
    monkeypatch.setattr(speed, "write_report", lambda path, results: [])
    options = ["--systems", "self-check", "--lengths", "8", "16", "--rounds", "2", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_status:
        speed.main([*options, "--shape", "tiny"])
    assert exit_status.value.code == 0
    assert len(started) == 6  # warm-up and two rounds, twice
    assert not any(worker.is_alive for worker in started)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--systems", "ours-magic-fp8"], ["ours-magic-fp8", "ours-sdpa-fp32", "dense-pytorch-fp32"]),
        (["--systems", "ours-flex-bf16"], ["ours-flex-bf16", "cuda"]),
        (["--lengths", "32", "long"], ["'long'", "mix"]),
        (["--lengths", "0"], ["'0'", "from 2"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--reference", "nobody"], ["nobody"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        speed.main(["--output", str(tmp_path / "new"), *options])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "new").exists()


def test_a_results_file_is_neither_overwritten_nor_mixed(tmp_path, capsys):
    path = tmp_path / "speed-tiny-cpu.json"
    options = ["--shape", "tiny", "--output", str(tmp_path)]
    for content, more, words in (
        ("{}", [], "--resume"),
        ("{}", ["--resume"], "holds no results"),
        ('{"format": 1, "settings": {"threads": 7}, "runs": [], "systems": {}, "records": []}', ["--resume"], "was"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit) as exit_status:
            speed.main([*options, *more])
        assert exit_status.value.code == 2
        assert words in capsys.readouterr().err
        assert path.read_text() == content


@pytest.mark.parametrize(("name", "other"), [("cpu", "another processor"), ("torch", "2.0.0"), ("logical_cores", 999)])
def test_figures_of_another_machine_or_version_are_not_mixed(name, other, tmp_path, capsys):
    machine = describe_machine()
    arguments = speed.parse_arguments(["--output", str(tmp_path)])
    results = new_results(speed.make_settings(speed.make_plan(arguments), arguments))
    results["runs"].append({"machine": machine})
    check_machine(results, describe_machine())
    (machine["versions"] if name == "torch" else machine)[name] = other
    path = tmp_path / "speed-small-cpu.json"
    path.write_text(content := json.dumps(results))
    with pytest.raises(SystemExit) as exit_status:
        speed.main(["--output", str(tmp_path), "--resume"])
    assert exit_status.value.code == 2
    assert f"{name} was {other!r} and is" in capsys.readouterr().err
    assert path.read_text() == content


def test_lengths_of_the_command_line():
    assert [parse_length(text) for text in ("2", "32768", "mix", "corpus")] == [2, 32768, "mix", "corpus"]
    for text in ("-1", "1", "1e3", "²", "131073", ""):
        with pytest.raises(ValueError, match="unknown length"):
            parse_length(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.needs_graph])
def test_the_graph_is_our_model(name, tmp_path_factory):
    for package in SYSTEMS[name].packages:
        pytest.importorskip(package)
    from benchmarks.graph_export import build
    from benchmarks.graph_systems import load

    cache = tmp_path_factory.getbasetemp() / "graphs"  # one export for all
    system = SYSTEMS[name]
    graph = load(system.kind, build(cache, SHAPE), threads=1, options=system.options)
    exact = name.endswith("fp32") and name != "openvino-export-fp32"  # its weights are stored as float16
    assert graph.info["largest_difference_to_torch"] < (1e-3 if exact else 1)
