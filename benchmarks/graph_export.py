"""The ONNX graphs of our model, built once for each shape and version of the code.

    python -m benchmarks.graph_export --shape small --cache FOLDER

Two of them: what `hub_repo.export` writes, whose attention goes block by block; and a trace of the quadratic
computation, as anyone gets by exporting the official code, which is faster on short texts. The latter holds a dense
bias, `(batch, heads, length, length) float32`.

Law: a file is our `JinaBertModel` with dynamic batch and length, and beside it lie an input and what torch computes
for it, with which every runtime is checked before it is timed. Built in a process of its own: what building leaves in
memory would hide what a runtime takes.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .machine import describe_versions
from .workloads import SHAPES, Shape, make_batch

GRAPH, QUANTIZED, CHECK = "model.onnx", "model-int8.onnx", "check.npz"
EXPORT = "export"
"""Folder of what `hub_repo.export` writes, under its names there."""
CHECK_LENGTHS = (48, 31, 7)
_REPOSITORY = Path(__file__).parent.parent
_CODE = (
    *sorted((_REPOSITORY / "modeling_jina_bert").glob("*.py")),
    *sorted((_REPOSITORY / "hub_repo" / "formats").glob("*.py")),
    Path(__file__),
    Path(__file__).with_name("workloads.py"),
)


def graph_folder(cache: Path, shape: Shape) -> Path:
    """Folder of the graph: another one for other code, another shape or other packages.

    Args:
        cache: Folder of all graphs.
        shape: Of the model.
    """
    digest = hashlib.sha256(repr((shape, sorted(describe_versions().items()))).encode())
    for path in _CODE:
        digest.update(path.read_bytes())
    return cache / f"{shape.layers}x{shape.hidden}-{digest.hexdigest()[:12]}"


def build(cache: Path, shape: Shape) -> Path:
    """Writes the graphs, their int8 forms and the check, if they are not there yet.

    Args:
        cache: Folder of all graphs.
        shape: Of the model.

    Returns:
        The folder that has `GRAPH`, `QUANTIZED`, `CHECK` and `EXPORT`.
    """
    folder = graph_folder(cache, shape)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
        try:
            _trace(partial, shape)
            _quantize(partial)
            _export_as_published(partial / EXPORT, shape)
            os.replace(partial, folder)  # whole or not at all
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _trace(folder: Path, shape: Shape):
    import numpy as np
    import torch

    from .torch_systems import jina_bert

    class HiddenStates(torch.nn.Module):
        """The first output alone."""

        def __init__(self):
            super().__init__()
            self.model = jina_bert(shape)

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    module = HiddenStates().eval()
    arrays = make_batch(CHECK_LENGTHS)
    inputs = tuple(torch.from_numpy(array) for array in arrays)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        expected = module(*inputs).numpy()
        torch.onnx.export(
            module, inputs, folder / GRAPH, dynamo=True, input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"], dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        )  # fmt: skip
    np.savez(folder / CHECK, input_ids=arrays[0], attention_mask=arrays[1], last_hidden_state=expected)


def _quantize(folder: Path):
    """Dynamic quantisation: int8 weights, activations quantised anew in every call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(folder / GRAPH, folder / QUANTIZED, weight_type=QuantType.QInt8)


def _export_as_published(folder: Path, shape: Shape):
    from hub_repo.formats.onnx_export import FILES, write_onnx
    from hub_repo.formats.openvino_export import write_openvino

    from .torch_systems import jina_bert

    write_onnx(jina_bert(shape), folder, ("fp32", "int8"))
    write_openvino(folder / FILES["fp32"], folder)


def main(argv: Sequence[str] | None = None):
    """Entry point: builds the graphs and prints its folder."""
    parser = argparse.ArgumentParser(prog="benchmarks.graph_export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--cache", type=Path, required=True, help="folder of all graphs")
    arguments = parser.parse_args(argv)
    print(build(arguments.cache, SHAPES[arguments.shape]), file=sys.stdout)


if __name__ == "__main__":
    main()
