"""The other end of a worker: starts it, asks it, waits for its answer no longer than allowed, and ends it.

Law: `ask` always returns an answer with a `status`; a worker that crashed or took too long is dead afterwards and is
started anew by whoever needs it. No worker outlives its `WorkerProcess`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .worker import status_of

_REPOSITORY = Path(__file__).parent.parent
_TAIL = 600  # characters of a dead worker's standard error that are kept


class WorkerProcess:
    """A running worker.

    Args:
        threads: OMP_NUM_THREADS of the process; libraries that read something else are told when loading.
    """

    def __init__(self, threads: int):
        self.errors = tempfile.TemporaryFile()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH")))),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            bufsize=0,
            start_new_session=True,  # ended as a group, with the compilers that torch starts
        )
        self._received = b""

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def ask(self, request: str, *, limit_s: float, **arguments: Any) -> dict[str, Any]:
        """One request.

        Args:
            request: "load", "prepare" or "call".
            limit_s: Seconds to wait; afterwards the worker is ended.
            **arguments: JSON values, those of the method of `Worker`.

        Returns:
            `status` "ok" and what the method returned; or "failed", "out of memory" or "time limit", and a `message`.
        """
        line = json.dumps({"request": request, **arguments}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            answer = self._read_line(time.monotonic() + limit_s)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self.end()
            return {"status": "time limit", "message": f"{request}: no answer within {limit_s:g} s"}
        if not answer:
            return self._death()
        return json.loads(answer)

    def _read_line(self, deadline: float) -> bytes | None:
        """The next line; empty if the process ended, None if the time did."""
        stream = self.process.stdout
        while b"\n" not in self._received:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            block = os.read(stream.fileno(), 65536)
            if not block:
                return b""
            self._received += block
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self) -> dict[str, Any]:
        code = self.process.wait()
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace").strip()[-_TAIL:]
        if code == -signal.SIGKILL:
            return {"status": "out of memory", "message": f"killed, as the kernel does when memory runs out. {tail}"}
        return {"status": status_of(tail), "message": f"the worker ended with status {code}: {tail}"}

    def end(self):
        """Ends the process and all that it started; a second time it does nothing."""
        if self.errors.closed:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()
