"""The systems that run a graph of `graph_export`: onnxruntime (float32, int8), OpenVINO (its own precision, float32).

Law: a runtime that computes in float32 is within `TOLERANCE` of torch on the check of the graph, or it is not timed.
One that rounds by design (int8, OpenVINO on a processor with bf16, weights stored as float16) is timed, and its
difference is reported.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hub_repo.formats.onnx_export import FILES
from hub_repo.formats.openvino_export import FILE, import_openvino

from .graph_export import CHECK, EXPORT, GRAPH, QUANTIZED
from .workloads import make_batch, padded_batches

TOLERANCE = 1e-3
"""Largest absolute difference of a hidden state; hidden states leave a LayerNorm, their spread is 1."""


class Graph:
    """A loaded graph.

    Args:
        run: `input_ids` and `attention_mask` -> `last_hidden_state`, all numpy arrays.
        info: What the runtime says about itself.
    """

    def __init__(self, run: Callable, info: dict[str, Any]):
        self.run, self.info = run, info

    def check(self, folder: Path, *, exact: bool):
        """Compares with torch, at the valid tokens, and keeps the largest difference in `info`.

        Raises:
            ValueError: `exact`, and the difference is above `TOLERANCE`; or it is not a number.
        """
        known = np.load(folder / CHECK)
        found = self.run(known["input_ids"], known["attention_mask"])
        valid = known["attention_mask"].astype(bool)
        difference = float(np.abs(found - known["last_hidden_state"])[valid].max())
        self.info["largest_difference_to_torch"] = difference
        if not difference <= (TOLERANCE if exact else float("inf")):
            raise ValueError(f"the graph is {difference:.2g} off torch, more than {TOLERANCE:g}: not timed.")

    def prepare(self, lengths) -> dict[str, Any]:
        """Makes the batches and computes them; nothing is reported."""
        self.batches = [make_batch(batch) for batch in padded_batches(lengths)]
        self.call()
        return {}

    def call(self) -> list[np.ndarray]:
        """`(batch, length, hidden) float32` for each batch; OpenVINO's are views that its next call overwrites."""
        return [self.run(*inputs) for inputs in self.batches]


def _inputs(names: list[str], input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "token_type_ids" in names:
        inputs["token_type_ids"] = np.zeros_like(input_ids)
    return inputs


def _onnxruntime(path: Path, threads: int) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    names = [value.name for value in session.get_inputs()]

    def run(input_ids, attention_mask):
        return session.run(None, _inputs(names, input_ids, attention_mask))[0]

    return Graph(run, {"providers": session.get_providers()})


def _openvino(path: Path, threads: int, precision: str | None) -> Graph:
    openvino = import_openvino()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    names = [value.any_name for value in model.inputs]

    def run(input_ids, attention_mask):
        inputs = _inputs(names, input_ids, attention_mask)
        result = request.infer(inputs, share_inputs=True, share_outputs=True)  # no copies
        return result["last_hidden_state"]

    return Graph(run, {"precision": model.get_property("INFERENCE_PRECISION_HINT").get_type_name()})


def load(kind: str, folder: Path, *, threads: int, options: dict[str, Any]) -> Graph:
    """Loads and checks a graph.

    Args:
        kind: "onnxruntime" or "openvino".
        folder: What `graph_export.build` returned.
        threads: Of the runtime.
        options: `published`, for the form that `hub_repo.export` writes; of onnxruntime `quantized`; of OpenVINO
            `precision`, None for that of the device.

    Raises:
        ValueError: Another kind; a float32 runtime that is off torch by more than `TOLERANCE`.
    """
    published = options.get("published", False)
    if kind == "onnxruntime":
        quantized = options.get("quantized", False)
        traced = QUANTIZED if quantized else GRAPH
        path = folder / EXPORT / FILES["int8" if quantized else "fp32"] if published else folder / traced
        graph = _onnxruntime(path, threads)
        graph.check(folder, exact=not quantized)
    elif kind == "openvino":
        precision = options.get("precision")
        graph = _openvino(folder / EXPORT / FILE if published else folder / GRAPH, threads, precision)
        graph.check(folder, exact=precision == "f32" and not published)  # published: weights stored as float16
    else:
        raise ValueError(f"unknown kind {kind!r}: onnxruntime or openvino.")
    return graph
