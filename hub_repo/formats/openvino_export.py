"""The OpenVINO form (IR) of the encoder: openvino/openvino_model.xml and .bin, as optimum's loader names them.

Law: it is converted from the ONNX file, so there is one graph; inputs and output are the same.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_jina_bert import JinaBertModel

from ..requirements import require
from .parity import LENGTHS, Agreement, Run, Tolerance, check_engine, pooled

FILE = "openvino/openvino_model.xml"
TOLERANCES = {False: Tolerance(1e-5, 0.999999), True: Tolerance(2e-3, 0.9999)}
"""By whether the weights are stored as float16."""


def import_openvino() -> Any:
    """OpenVINO without its telemetry, unless that is imported already.

    TRAP: on import, and when it converts, it forks a process that calls home. Without a network that can wait for
    ever, and it holds our output open: what reads it by a pipe waits, too.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then takes its own stub
    return require("openvino", "export")


def write_openvino(source: Path, folder: Path, *, half: bool = True) -> Path:
    """Converts an ONNX file.

    Args:
        source: The float32 file of `write_onnx`.
        folder: The files go to its sub-folder `openvino`.
        half: Store the weights as float16; they are computed in the precision of the device all the same.

    Returns:
        The .xml file; the weights lie beside it.
    """
    openvino = import_openvino()
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=half)
    return path


def openvino_engine(path: Path, threads: int | None = None) -> Run:
    """The file in OpenVINO on the CPU, in float32: on processors with bf16 its default rounds to that.

    Args:
        path: The .xml file.
        threads: Of OpenVINO; None is its default, one a core.
    """
    openvino = import_openvino()
    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        return pooled(request.infer(batch)["last_hidden_state"], batch["attention_mask"])

    return run


def check_openvino(path: Path, model: JinaBertModel, *, half: bool, lengths: Sequence[int] = LENGTHS) -> Agreement:
    """Loads the file in OpenVINO and compares its vectors with the model's.

    Raises:
        RuntimeError: They differ by more than the rounding of the stored weights, or the control passes.
    """
    return check_engine(path.name, openvino_engine(path), model, TOLERANCES[half], lengths=lengths)
