"""Tokens per second and peak memory of JinaBERT beside what a user would pick instead.

    python -m benchmarks.speed --shape small --output benchmarks/results

Laws: random weights (see workloads.py), the same batches for all; every system in a process of its own, one computing
at a time; what cannot run is listed with the reason. Everything wrong with the command line is said before the first
call.
COST: every system keeps its weights in memory until it is not needed any more.
"""

import argparse
import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .machine import describe_machine, physical_cores
from .report import print_report, write_report
from .results import BenchmarkError, check_machine, check_settings, new_results, read_results, write_results
from .rounds import Benchmark, Plan
from .systems import HIDDEN, SYSTEMS, select
from .workloads import (
    CORPUS,
    DEFAULT_LENGTHS,
    INITIALIZER_RANGE,
    MIX,
    SEED,
    SHAPES,
    VOCABULARY,
    make_workload,
    parse_length,
)

DEFAULT_REFERENCE = "ours-sdpa-fp32"
DEFAULTS = " ".join(map(str, DEFAULT_LENGTHS))
_HERE = Path(__file__).parent


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.speed",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"Systems: {', '.join(SYSTEMS | HIDDEN)}.",
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="layers and widths (default: small)")
    parser.add_argument(
        "--lengths", nargs="+", metavar="LENGTH", help=f"tokens a sequence, {MIX}, {CORPUS} (default: {DEFAULTS})"
    )
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", help="names (default: all of the device)")
    parser.add_argument("--reference", help=f"system of the ratios (default: {DEFAULT_REFERENCE}, or the first)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each system at each length (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the computation on the CPU (default: physical cores)")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of a call, about; the mix has its own (default: 4096)"
    )
    parser.add_argument("--time-limit", type=float, default=120, help="seconds of a call (default: 120)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in this dtype, for the share of it")
    parser.add_argument("--output", type=Path, default=_HERE / "results", help="folder (default: benchmarks/results)")
    parser.add_argument("--resume", action="store_true", help="skip what the output has already")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "modeling-jina-bert" / "benchmarks",
        help="folder of the ONNX graphs (default: ~/.cache/modeling-jina-bert/benchmarks)",
    )
    return parser.parse_args(argv)


def make_plan(arguments: argparse.Namespace, *, reference: str | None = None) -> Plan:
    """What the command line asks for.

    Args:
        arguments: Of `parse_arguments`.
        reference: That of the document which is resumed.

    Raises:
        ValueError: An unknown system or length, or a number that makes no sense.
    """
    for name in ("rounds", "tokens", "threads", "time_limit", "peak_tflops"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise BenchmarkError(f"--{name.replace('_', '-')} {value}: has to be more than 0.")
    names = list(select(arguments.systems, arguments.device))
    fallback = DEFAULT_REFERENCE if DEFAULT_REFERENCE in names else names[0]
    reference = arguments.reference or reference or fallback
    lengths = {parse_length(text) for text in arguments.lengths} if arguments.lengths else DEFAULT_LENGTHS
    workloads = [make_workload(length, arguments.tokens) for length in lengths]
    return Plan(
        systems=select([*names, reference], arguments.device),
        workloads=sorted(workloads, key=lambda workload: max(workload.lengths)),
        shape=arguments.shape,
        device=arguments.device,
        threads=arguments.threads or physical_cores(),
        rounds=arguments.rounds,
        reference=reference,
        time_limit_s=arguments.time_limit,
        cache=arguments.cache.absolute(),
    )


def make_settings(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be equal for figures to stand side by side."""
    return {
        "shape": {"name": plan.shape, **asdict(SHAPES[plan.shape])},
        "vocabulary": VOCABULARY,
        "initializer_range": INITIALIZER_RANGE,
        "seed": SEED,
        "device": plan.device,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "reference": plan.reference,
        "tokens": arguments.tokens,
        "mix": list(make_workload(MIX, arguments.tokens).lengths),
    }


def prepare_output(arguments: argparse.Namespace, machine: dict[str, Any]) -> tuple[Path, Plan, dict[str, Any]]:
    """The results file, the plan and the document, new or resumed.

    Raises:
        BenchmarkError: The file exists and --resume is not given, or was measured with other settings, on another
            machine or with other versions.
    """
    path = arguments.output / f"speed-{arguments.shape}-{arguments.device}.json"
    if not path.exists():
        plan = make_plan(arguments)
        results = new_results(make_settings(plan, arguments))
    elif not arguments.resume:
        raise BenchmarkError(f"{path} exists: add --resume to go on with it, or take another --output.")
    else:
        results = read_results(path)
        plan = make_plan(arguments, reference=results["settings"].get("reference"))
        check_settings(results, make_settings(plan, arguments))
        check_machine(results, machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {arguments.output}: {error}") from error
    return path, plan, results


def main(argv: Sequence[str] | None = None):
    """Entry point: status 2 for a wrong input, 1 if nothing could be measured, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    machine = describe_machine()
    try:
        path, plan, results = prepare_output(arguments, machine)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    results["runs"].append(
        {
            "command": shlex.join(["python", "-m", "benchmarks.speed", *argv]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "time_limit_s": plan.time_limit_s,
            "peak_tflops": arguments.peak_tflops,
            "machine": machine,
        }
    )
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers, and keeps what there is
    try:
        with Benchmark(plan, results, lambda: write_results(path, results)) as benchmark:
            benchmark.run()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        status = 130
    if not results["records"]:
        print("error: nothing was measured", file=sys.stderr)
        sys.exit(status or 1)
    write_results(path, results)
    print_report(results)
    for written in (path, *write_report(path, results)):
        print(f"wrote {written}")
    if not any(record["status"] == "ok" for record in results["records"]):
        status = status or 1
    sys.exit(status)


if __name__ == "__main__":
    main()
