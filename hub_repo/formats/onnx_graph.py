"""The encoder as an ONNX graph, written node by node.

Law: batch and length are dynamic and memory is linear in the length. Attention is computed a block of queries at a
time (an ONNX Loop), each with its own part of the ALiBi bias, made at run time: no tensor of length x length exists,
and nothing of the size of `max_position_embeddings` is in the file. Attention is float32 whatever the weights are.

The graph is not traced from the torch model: tracing took 17 s for three layers, wrote the paths of this machine into
the file, and a Scan that OpenVINO does not read. What keeps the two equal is that every export is compared with torch.
COST: scores of one block of one layer, `(batch, heads, BLOCK, length) float32`.
"""

from typing import Any

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from ..requirements import require

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
BLOCK = 128
"""Queries whose scores exist at a time."""
OPSET = 20  # the first with Gelu; onnxruntime 1.17 and later
_IR = 9  # what onnxruntime 1.17 reads


class _Graph:
    """Nodes and constants in the order they are added; every value is known by its name."""

    def __init__(self, onnx: Any, prefix: str = ""):
        self.onnx, self.prefix = onnx, prefix
        self.nodes: list = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, name: str = "", **attributes) -> Any:
        """Adds a node; returns the name of its output, or a list of them."""
        stem = name or f"{self.prefix}{operator}_{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, names, name=stem, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, value) -> str:
        """A constant under this name; adding it a second time changes nothing."""
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """To float32 or float16."""
        types = {torch.float32: self.onnx.TensorProto.FLOAT, torch.float16: self.onnx.TensorProto.FLOAT16}
        return self.add("Cast", value, to=types[dtype])


class _Encoder(_Graph):
    """The graph of one model: the same steps as `JinaBertModel`, by the same names.

    Args:
        onnx: The package.
        model: In the dtype that the weights are to have, float32 or float16.
    """

    def __init__(self, onnx: Any, model: JinaBertModel):
        super().__init__(onnx)
        self.config, self.dtype = model.config, model.dtype
        self.weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
        self.head_size = self.config.hidden_size // self.config.num_attention_heads
        slopes = np.array(model.slopes, dtype=np.float32)[:, None, None]
        self.slopes = self.constant("negative_slopes", -slopes)  # heads, 1, 1

    def linear(self, value: str, name: str) -> str:
        """x W^T + b, if there is a bias."""
        matrix = self.constant(f"{name}.weight", np.ascontiguousarray(self.weights[f"{name}.weight"].T))
        value = self.add("MatMul", value, matrix)
        if f"{name}.bias" not in self.weights:
            return value
        return self.add("Add", value, self.constant(f"{name}.bias", self.weights[f"{name}.bias"]))

    def norm(self, value: str, name: str) -> str:
        """LayerNorm; its statistics are float32 by the definition of the operator."""
        scale, bias = (self.constant(f"{name}.{x}", self.weights[f"{name}.{x}"]) for x in ("weight", "bias"))
        epsilon = float(self.config.layer_norm_eps)
        return self.add("LayerNormalization", value, scale, bias, axis=-1, epsilon=epsilon)

    def embeddings(self) -> str:
        """`(batch, length, hidden)`."""
        both = []
        for kind, ids in (("word", INPUTS[0]), ("token_type", INPUTS[2])):
            name = f"embeddings.{kind}_embeddings.weight"
            both.append(self.add("Gather", self.constant(name, self.weights[name]), ids))
        return self.norm(self.add("Add", *both), "embeddings.LayerNorm")

    def geometry(self):
        """What every layer shares: the number of blocks, the padding of queries and of keys, the columns' numbers."""
        self.length = self.add("Shape", INPUTS[0], start=1, end=2)
        blocks = self.add("Div", self.add("Add", self.length, self.integers(BLOCK - 1)), self.integers(BLOCK))
        missing = self.add("Sub", self.add("Mul", blocks, self.integers(BLOCK)), self.length)
        self.blocks = self.add("Squeeze", blocks)
        self.query_padding = self.add("Concat", self.integers(*[0] * 6), missing, self.integers(0), axis=0)
        zero, one = (self.constant(f"scalar_{x}", np.int64(x)) for x in (0, 1))
        columns = self.add("Range", zero, self.add("Squeeze", self.length), one)
        self.columns = self.cast(columns, torch.float32)
        absent = self.add("Sub", self.constant("float_1", np.float32(1)), self.cast(INPUTS[1], torch.float32))
        smallest = self.constant("smallest", np.finfo(np.float32).min)
        self.padding = self.add("Unsqueeze", self.add("Mul", absent, smallest), self.integers(1, 2))  # batch, 1, 1, L
        self.rows = self.constant("rows", np.arange(BLOCK, dtype=np.float32)[:, None])

    def heads(self, value: str, *axes: int) -> str:
        """`(batch, length, hidden)` -> float32 `(batch, length, heads, head_size)`, its axes permuted."""
        shape = self.integers(0, 0, self.config.num_attention_heads, self.head_size)
        return self.add("Transpose", self.cast(self.add("Reshape", value, shape), torch.float32), perm=axes)

    def attention(self, value: str, name: str) -> str:
        """Self-attention, its output projection, residual and norm."""
        query, key = self.linear(value, f"{name}.self.query"), self.linear(value, f"{name}.self.key")
        if self.config.qk_post_norm:
            query, key = self.norm(query, f"{name}.self.layer_norm_q"), self.norm(key, f"{name}.self.layer_norm_k")
        keys, values = self.heads(key, 0, 2, 3, 1), self.heads(self.linear(value, f"{name}.self.value"), 0, 2, 1, 3)
        scaling = self.constant("scaling", np.float32(self.head_size**-0.5))
        queries = self.add("Pad", self.add("Mul", self.heads(query, 0, 2, 1, 3), scaling), self.query_padding)
        shape = self.integers(0, self.config.num_attention_heads, -1, BLOCK, self.head_size)
        queries = self.add("Transpose", self.add("Reshape", queries, shape), perm=(2, 0, 1, 3, 4))
        context = self.add(
            "Loop", self.blocks, "", name=f"{name}.context", body=self.block(queries, keys, values, name)
        )
        context = self.add("Transpose", context, perm=(1, 0, 3, 2, 4))  # batch, blocks, BLOCK, heads, head_size
        context = self.add("Reshape", context, self.integers(0, -1, self.config.hidden_size))
        context = self.add("Slice", context, self.integers(0), self.length, self.integers(1))
        dense = self.linear(self.cast(context, self.dtype), f"{name}.output.dense")
        return self.norm(self.add("Add", dense, value), f"{name}.output.LayerNorm")

    def block(self, queries: str, keys: str, values: str, name: str):
        """The body of the loop: attention of one block of queries over all keys."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        body = _Graph(self.onnx, f"{name}.block.")
        index, go_on = f"{name}.index", f"{name}.go_on"
        first = body.add(
            "Mul", body.add("Cast", index, to=types.FLOAT), self.constant("float_block", np.float32(BLOCK))
        )
        distance = body.add("Abs", body.add("Sub", body.add("Add", self.rows, first), self.columns))
        alibi = body.add("Mul", self.slopes, distance)  # heads, BLOCK, length
        scores = body.add("MatMul", body.add("Gather", queries, index, axis=0), keys)
        scores = body.add("Add", body.add("Add", scores, alibi), self.padding)
        context = body.add("MatMul", body.add("Softmax", scores, axis=-1), values)
        went_on = body.add("Identity", go_on)
        return helper.make_graph(
            body.nodes,
            f"{name}.block",
            [
                helper.make_tensor_value_info(index, types.INT64, []),
                helper.make_tensor_value_info(go_on, types.BOOL, []),
            ],
            [
                helper.make_tensor_value_info(went_on, types.BOOL, []),
                helper.make_tensor_value_info(context, types.FLOAT, [None] * 4),
            ],
        )

    def gated(self, value: str, name: str, activated: int) -> str:
        """Gated linear unit: the halves of a projection, one of them through the activation, multiplied."""
        halves = self.add("Split", self.linear(value, name), outputs=2, axis=-1, num_outputs=2)
        operator = "Gelu" if self.config.hidden_act == "gelu" else "Relu"
        halves[activated] = self.add(operator, halves[activated])
        return self.add("Mul", *halves)

    def layer(self, value: str, name: str) -> str:
        """One layer, in the arrangement of either layout; see `JinaBertLayer`."""
        attended = self.attention(value, f"{name}.attention")
        if not self.config.qk_post_norm:
            output = self.linear(self.gated(attended, f"{name}.mlp.gated_layers", 0), f"{name}.mlp.wo")
            return self.norm(self.add("Add", output, attended), f"{name}.mlp.layernorm")
        attended = self.norm(self.add("Add", value, attended), f"{name}.layer_norm_1")
        output = self.linear(self.gated(attended, f"{name}.mlp.up_gated_layer", 1), f"{name}.mlp.down_layer")
        return self.norm(self.add("Add", attended, output), f"{name}.layer_norm_2")


def encoder_graph(model: JinaBertModel):
    """The model as an ONNX ModelProto; a pooler is left out.

    Args:
        model: In the dtype that the weights are to have, float32 or float16.

    Returns:
        Inputs `INPUTS`, each `(batch, length) int64`; output `OUTPUT`, `(batch, length, hidden) float32`.

    Raises:
        ImportError: The package onnx is not installed.
    """
    onnx = require("onnx", "export")
    make, types = onnx.helper, onnx.TensorProto
    encoder = _Encoder(onnx, model)
    encoder.geometry()
    value = encoder.embeddings()
    for i in range(model.config.num_hidden_layers):
        value = encoder.layer(value, f"encoder.layer.{i}")
    encoder.add("Cast", value, name=OUTPUT, to=types.FLOAT)
    graph = make.make_graph(
        encoder.nodes,
        "jina_bert",
        [make.make_tensor_value_info(name, types.INT64, ["batch", "length"]) for name in INPUTS],
        [make.make_tensor_value_info(OUTPUT, types.FLOAT, ["batch", "length", model.config.hidden_size])],
        list(encoder.constants.values()),
    )
    opsets = [make.make_opsetid("", OPSET)]
    content = make.make_model(graph, producer_name="modeling-jina-bert", opset_imports=opsets, ir_version=_IR)
    onnx.checker.check_model(content)
    return content
