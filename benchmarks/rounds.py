"""The measuring: rounds over the systems at one length after the other, one worker computing at a time.

Law: in every round each system is called once, in random order, so that what the machine does meanwhile falls on all
alike; a ratio compares two calls of one round. The document is written after every length.
"""

import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .machine import memory_bytes
from .results import LIMITS, find_record, is_settled, limit_below, put_record
from .systems import System, missing
from .worker_process import WorkerProcess
from .workloads import SEED, SHAPES, Workload, operations

logger = logging.getLogger(__name__)

LOADING_LIMIT_S = 900
"""Seconds for loading a system, in which torch.compile compiles; and for building the graph."""
PAUSE_S = 0.05
"""Between two calls: threads of the last one that still spin fall asleep."""
IDLE_SHARE = 1 / 32
"""Of the memory of the machine, what a worker may keep while others compute. One that keeps more (runtimes do, after a
large call) is ended, and loaded and warmed up again when it is its turn: the others need the room."""
SETTLED_BYTES = 64 * 2**20
"""What a worker may keep between two lengths; with more it is started anew, or one length would count in another."""


@dataclass
class Plan:
    """What is measured.

    Attributes:
        systems: Name -> system, in the order of the tables.
        workloads: Shortest first.
        shape: Name of the shape.
        device: "cpu" or "cuda".
        threads: Of the computation on the CPU.
        rounds: Timed calls of each system at each length.
        reference: Name of the system that ratios compare with.
        time_limit_s: Seconds of a call after which a system is not tried at longer lengths.
        cache: Folder of the ONNX graphs.
    """

    systems: dict[str, System]
    workloads: Sequence[Workload]
    shape: str
    device: str
    threads: int
    rounds: int
    reference: str
    time_limit_s: float
    cache: Path


@dataclass
class _Contender:
    """A system at one length: its answers so far."""

    facts: dict[str, Any]
    seconds: dict[int, float] = field(default_factory=dict)  # round -> seconds
    peak_bytes: list[int | None] = field(default_factory=list)
    others_cpu_seconds: list[float | None] = field(default_factory=list)
    status: str = "ok"
    message: str | None = None


def build_graph(cache: Path, shape: str) -> tuple[Path | None, str | None]:
    """Builds the ONNX graph in a process of its own.

    Returns:
        Its folder and None; or None and what went wrong.
    """
    command = [sys.executable, "-m", "benchmarks.graph_export", "--shape", shape, "--cache", str(cache)]
    repository = Path(__file__).parent.parent
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=LOADING_LIMIT_S, cwd=repository)
    except subprocess.TimeoutExpired:
        return None, f"the export took more than {LOADING_LIMIT_S} s"
    if process.returncode:
        return None, f"the export failed: {process.stderr.strip()[-600:]}"
    return Path(process.stdout.strip().splitlines()[-1]), None


class Benchmark:
    """A run: owns the workers. Use it in a `with` statement, which ends them.

    Args:
        plan: What is measured.
        results: The document that records go to; `systems` and the last of `runs` are filled in.
        save: Called after every length.
    """

    def __init__(self, plan: Plan, results: dict[str, Any], save: Callable[[], None]):
        self.plan, self.results, self.save = plan, results, save
        self.workers: dict[str, WorkerProcess] = {}
        self.unusable: dict[str, tuple[str, str]] = {}  # name -> status and message
        self.graph: Path | None = None
        for name, system in plan.systems.items():
            reason = missing(system, plan.device)
            if reason is not None:
                self.unusable[name] = reason
            listed = {key: getattr(system, key) for key in ("kind", "dtype", "longest", "description")}
            known = results["systems"].get(name, {})
            results["systems"][name] = {**known, **listed}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end_workers(self.workers)

    def run(self):
        """Measures what the document does not have yet."""
        for index, workload in enumerate(self.plan.workloads):
            due = [name for name in self.plan.systems if not self._is_final(name, workload)]
            if due:
                self._measure(workload, due)
                self.save()
            self._settle_workers()
            # What is not needed any more would take memory from the longer lengths.
            later = self.plan.workloads[index + 1 :]
            useless = [name for name in self.workers if all(self._obstacle(name, x) for x in later)]
            self._end_workers(useless)

    def _is_final(self, name: str, workload: Workload) -> bool:
        record = find_record(self.results, name, workload.name)
        return record is not None and is_settled(self.results, record, self.plan.time_limit_s)

    def _obstacle(self, name: str, workload: Workload) -> tuple[str, str] | None:
        """Status and reason why a system is not tried at a length; None if it is."""
        if name in self.unusable:
            return self.unusable[name]
        longest = self.plan.systems[name].longest
        if max(workload.lengths) > longest:
            return "skipped", f"tried up to {longest} tokens"
        known = find_record(self.results, name, workload.name)
        if known is not None and known["status"] in LIMITS and self._is_final(name, workload):
            # asked for again as the reference only
            return known["status"], known["message"]
        reason = limit_below(self.results, name, max(workload.lengths), self.plan.time_limit_s)
        return ("skipped", reason) if reason is not None else None

    def _measure(self, workload: Workload, due: Sequence[str]):
        """All rounds at one length."""
        names = list(due) if self.plan.reference in due else [self.plan.reference, *due]
        logger.info("%s tokens, %d sequences: warming up", workload.name, len(workload.lengths))
        contenders: dict[str, _Contender] = {name: self._prepare(name, workload) for name in names}
        generator = random.Random(f"{SEED} {workload.name}")
        for turn in range(self.plan.rounds):
            order = [name for name in names if contenders[name].status == "ok"]
            generator.shuffle(order)
            logger.info("%s tokens: round %d of %d", workload.name, turn + 1, self.plan.rounds)
            for name in order:
                self._call(name, contenders[name], workload, turn)
        for name in due:
            self._put(name, workload, contenders)

    def _prepare(self, name: str, workload: Workload) -> _Contender:
        """Loads a system if necessary, and lets it compute the batch once."""
        obstacle = self._obstacle(name, workload)
        if obstacle is None and name not in self.workers:
            obstacle = self._load(name)
        if obstacle is not None:
            return _Contender({}, status=obstacle[0], message=obstacle[1])
        answer = self._ask(name, "prepare", limit_s=self.plan.time_limit_s, lengths=list(workload.lengths))
        self._end_if_large(name, answer.pop("kept_bytes", 0))
        return _Contender(answer, status=answer.pop("status"), message=answer.pop("message", None))

    def _call(self, name: str, contender: _Contender, workload: Workload, turn: int):
        """One timed call; a worker that had to be ended is brought back to where it was before."""
        answer = {"status": "ok"}
        if name not in self.workers:
            obstacle = self._load(name)
            if obstacle is not None:
                answer = dict(zip(("status", "message"), obstacle, strict=True))
            else:
                answer = self._ask(name, "prepare", limit_s=self.plan.time_limit_s, lengths=list(workload.lengths))
        if answer["status"] == "ok":
            time.sleep(PAUSE_S)
            answer = self._ask(name, "call", limit_s=self.plan.time_limit_s)
        if answer["status"] != "ok":
            contender.status, contender.message = answer["status"], answer["message"]
            return
        self._end_if_large(name, answer["kept_bytes"])
        contender.seconds[turn] = answer["seconds"]
        contender.peak_bytes.append(answer["peak_bytes"])
        contender.others_cpu_seconds.append(answer["others_cpu_seconds"])

    def _load(self, name: str) -> tuple[str, str] | None:
        """Starts the worker of a system; status and message if that fails, and it is not tried again."""
        graph = None
        if self.plan.systems[name].needs_graph:
            graph, reason = self._built_graph()
            if reason is not None:
                self.unusable[name] = "failed", reason
                return self.unusable[name]
        logger.info("loading %s", name)
        self.workers[name] = WorkerProcess(self.plan.threads)
        answer = self._ask(
            name, "load", limit_s=LOADING_LIMIT_S, system=name, shape=self.plan.shape, device=self.plan.device,
            threads=self.plan.threads, graph=graph and str(graph),
        )  # fmt: skip
        if answer["status"] != "ok":
            self._end_workers([name])
            self.unusable[name] = answer["status"], f"loading: {answer['message']}"
            return self.unusable[name]
        answer.pop("status")
        self.results["systems"][name]["loading"] = answer
        return None

    def _built_graph(self) -> tuple[Path | None, str | None]:
        if self.graph is None:
            logger.info("building the ONNX graph, if it is not there")
            self.graph, reason = build_graph(self.plan.cache, self.plan.shape)
            return self.graph, reason
        return self.graph, None

    def _ask(self, name: str, request: str, **arguments: Any) -> dict[str, Any]:
        """A worker's answer; a worker that is dead afterwards is forgotten."""
        worker = self.workers[name]
        answer = worker.ask(request, **arguments)
        if not worker.is_alive:
            self._end_workers([name])
        return answer

    def _put(self, name: str, workload: Workload, contenders: dict[str, _Contender]):
        """Writes the record of a system at a length."""
        contender, reference = contenders[name], contenders[self.plan.reference]
        gated = self.plan.systems[name].kind != "bert"
        record = {
            "system": name,
            "length": workload.name,
            "status": contender.status,
            "message": contender.message,
            "batch": len(workload.lengths),
            "tokens": workload.tokens,
            "longest": max(workload.lengths),
            "operations": operations(SHAPES[self.plan.shape], workload.lengths, gated=gated),
            "run": len(self.results["runs"]) - 1,
            **contender.facts,
            "seconds": list(contender.seconds.values()),
            "reference_seconds": [reference.seconds.get(turn) for turn in contender.seconds],
            "peak_bytes": contender.peak_bytes,
            "others_cpu_seconds": contender.others_cpu_seconds,
        }
        put_record(self.results, record)
        if contender.status == "ok":
            said = f"{workload.tokens / median(record['seconds']):,.0f} tokens/s"
        else:
            said = f"{contender.status}: {contender.message}"
        logger.info("%s tokens, %s: %s", workload.name, name, said)

    def _end_if_large(self, name: str, kept_bytes: int):
        memory = memory_bytes("MemTotal")
        if memory is not None and kept_bytes > IDLE_SHARE * memory:
            self._end_workers([name])

    def _settle_workers(self):
        answers = {name: self._ask(name, "settle", limit_s=60) for name in list(self.workers)}
        self._end_workers([name for name, x in answers.items() if x.get("kept_bytes", 0) > SETTLED_BYTES])

    def _end_workers(self, names):
        for name in list(names):
            worker = self.workers.pop(name, None)
            if worker is not None:
                worker.end()
