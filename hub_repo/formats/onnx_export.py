"""ONNX files of the encoder: float32, float16 and dynamically quantised int8, for onnxruntime and transformers.js.

Law: a file is loaded in onnxruntime and gives the vectors of torch before it counts as written. Inputs are those of
the released files; the output is `last_hidden_state`, the mean over the mask is the caller's. The graph is described
in onnx_graph.py.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from ..folders.checkpoint_files import FolderError
from ..requirements import require
from .onnx_graph import OUTPUT, encoder_graph
from .parity import LENGTHS, Agreement, Run, Tolerance, check_engine, pooled

FILES = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}
"""Precision -> file; the names that transformers.js looks for."""
TOLERANCES = {"fp32": Tolerance(1e-5, 0.999999), "fp16": Tolerance(2e-3, 0.9999), "int8": Tolerance(5e-2, 0.99)}
_DOWN = (".mlp.wo.weight", ".mlp.down_layer.weight")
_LARGEST = 2**31 - 2**20  # bytes; a protobuf file cannot be larger


def write_onnx(model: JinaBertModel, folder: Path, precisions: Sequence[str] = tuple(FILES)) -> list[Path]:
    """Writes one file for each precision.

    Args:
        model: The float32 model; a pooler is left out.
        folder: The files go to its sub-folder `onnx`.
        precisions: "fp32", "fp16", "int8".

    Returns:
        The files.

    Raises:
        FolderError: An unknown precision; weights that overflow in float16; a file that would be above 2 GiB.
        ImportError: A package is missing.
    """
    if unknown := sorted(set(precisions) - set(FILES)):
        raise FolderError(f"ONNX precision {unknown[0]!r} is not one of {', '.join(FILES)}.")
    for precision in precisions:
        path = folder / FILES[precision]
        path.parent.mkdir(parents=True, exist_ok=True)
        if precision == "fp32":
            _write(model, path)
        elif precision == "fp16":
            half = copy.deepcopy(model).half()
            if not all(torch.isfinite(parameter).all() for parameter in half.parameters()):
                raise FolderError("ONNX fp16: weights overflow in float16: export fp32 and int8 only.")
            _write(half, path)
        else:
            _quantize(model, path)
    return [folder / FILES[precision] for precision in precisions]


def _write(model: JinaBertModel, path: Path):
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > _LARGEST:
        raise FolderError(f"ONNX: {size / 1e9:.1f} GB of weights do not fit into one file of 2 GiB.")
    require("onnx", "export").save(encoder_graph(model), path)


def _quantize(model: JinaBertModel, path: Path):
    """Dynamic quantisation: 8-bit matrices and word embeddings, activations quantised anew in every call.

    The down projections of the MLPs stay in float32: some units of a gated MLP are hundreds of times the others, and
    one scale for all of them leaves these nothing (shipped model, three sentences: smallest cosine to torch 0.975 with
    them, 0.9998 without; a quarter more bytes).

    TRAP: with signed weights per channel, the 16-bit sums of processors without VNNI overflow: the smallest cosine to
    torch was 0.89 and 0.97 on the models of the tests, 0.945 on the shipped one; with unsigned weights 0.997 and more.
    """
    quantization = require("onnxruntime.quantization", "export")
    source = path.with_name("source.onnx")
    _write(model, source)
    nodes = require("onnx", "export").load(source, load_external_data=False).graph.node
    try:
        with _quiet():
            quantization.quantize_dynamic(
                source,
                path,
                weight_type=quantization.QuantType.QUInt8,
                per_channel=True,
                nodes_to_exclude=[node.name for node in nodes if any(x.endswith(_DOWN) for x in node.input)],
            )
    finally:
        source.unlink()


def onnxruntime_engine(path: Path, threads: int | None = None) -> Run:
    """The file in onnxruntime on the CPU.

    Args:
        path: A file of `write_onnx`.
        threads: Of onnxruntime; None is its default, one a core.
    """
    onnxruntime = require("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        return pooled(session.run([OUTPUT], batch)[0], batch["attention_mask"])

    return run


def check_onnx(path: Path, model: JinaBertModel, precision: str, *, lengths: Sequence[int] = LENGTHS) -> Agreement:
    """Loads the file in onnxruntime and compares its vectors with the model's.

    Raises:
        RuntimeError: They differ by more than the tolerance of the precision, or the control passes.
    """
    return check_engine(path.name, onnxruntime_engine(path), model, TOLERANCES[precision], lengths=lengths)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantiser's advice to pre-process the graph from the user: there is nothing to do in this one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
