"""torch.compile and torch.export: one graph for the layers, whatever the lengths, with the numbers of the model."""

import shutil

import pytest
import torch
from conftest import tiny_config
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_jina_bert import JinaBertModel

SHAPES = [(2, 9), (3, 17), (2, 33), (4, 50), (2, 1200)]


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield JinaBertModel(tiny_config(vocab_size=100)).eval()
    torch.compiler.reset()


def batch(size: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(1, 100, (size, length)), "attention_mask": mask}


def test_the_layers_are_one_graph_for_all_lengths(model):
    batches = [batch(*shape) for shape in SHAPES]
    with torch.no_grad():
        expected = [model(**inputs).last_hidden_state for inputs in batches]
    counter = CompileCounterWithBackend("aot_eager")
    model.encoder.compile(backend=counter, fullgraph=True, dynamic=True)  # fullgraph: a graph break is an error
    frames = []
    with torch.no_grad():
        for inputs, states in zip(batches, expected, strict=True):
            assert (model(**inputs).last_hidden_state - states).abs().max() < 1e-5
            frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames == [frames[0]] * len(SHAPES)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_training_the_compiled_layers(implementation, post_norm):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = JinaBertModel(tiny_config(vocab_size=100, qk_post_norm=post_norm)).train()
    model.set_attn_implementation(implementation)
    inputs = batch(3, 70)
    gradients = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        if compiled:
            model.encoder.compile(backend=counter, fullgraph=True, dynamic=True)
        model.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.encoder.parameters()])
    assert counter.frame_count > 0
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_training_under_the_default_compiler(model):
    """inductor, which a user's `compile()` takes: the same states and gradients, compiled once for two lengths."""
    model.train()
    counter = CompileCounterWithBackend("inductor")
    batches = [batch(2, 23), batch(3, 71)]
    results, frames = [], []
    for compiled in (False, True):
        if compiled:
            model.encoder.compile(backend=counter, fullgraph=True, dynamic=True)
        for inputs in batches:
            model.zero_grad()
            states = model(**inputs).last_hidden_state
            states.square().mean().backward()
            results.append([states.detach(), *(parameter.grad.clone() for parameter in model.encoder.parameters())])
            frames.append(counter.frame_count)
    assert 0 < frames[2] == frames[3]
    for found, expected in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_model_stops_recompiling(model):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    frames = []
    with torch.no_grad():
        for shape in [*SHAPES, (5, 77), (2, 700)]:
            inputs = batch(*shape)
            difference = compiled(**inputs).last_hidden_state - model(**inputs).last_hidden_state
            assert difference.abs().max() < 1e-5
            frames.append(counter.frame_count)
    assert frames[-1] == frames[3]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_export_serves_every_batch_length_and_padding(model, name):
    model.set_attn_implementation(name)
    size, length = torch.export.Dim("size", min=2, max=64), torch.export.Dim("length", min=2, max=16384)
    dynamic = {key: {0: size, 1: length} for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        program = torch.export.export(model, (), batch(3, 17), dynamic_shapes=dynamic, strict=False)
        for shape in SHAPES:
            inputs = batch(*shape)
            valid = inputs["attention_mask"].bool()
            found = program.module()(**inputs).last_hidden_state[valid]
            assert (found - model(**inputs).last_hidden_state[valid]).abs().max() < 2e-5
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("jina_bert_" in target for target in names)  # standard operators only: any runtime can take it
