"""The MLM loss without logits: equal to the plain one, gradients included, and it never holds the logits.

Equality with the official code is in test_golden.py.
"""

import copy

import pytest
import torch
from conftest import tiny_config
from test_attention import LargestTensor
from transformers import Trainer, TrainingArguments

from modeling_jina_bert import JinaBertForMaskedLM, masked_lm_head
from modeling_jina_bert.masked_lm_head import LOGITS_BLOCK

VOCABULARY = 5000


@pytest.fixture
def model():
    torch.manual_seed(0)
    return JinaBertForMaskedLM(tiny_config(vocab_size=VOCABULARY, sparse_prediction=True)).train()


def batch(length: int = 500):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (4, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("bias", [0.0, -200.0])
def test_the_loss_without_logits_equals_the_plain_one(model, bias):
    """Also where the probability of a label is less than float32 can hold."""
    with torch.no_grad():
        model.cls.predictions.bias[1:VOCABULARY:7] = bias
    plain = copy.deepcopy(model)
    plain.config.sparse_prediction = False
    inputs = batch()
    results = []
    for instance in (plain, model):
        outputs = instance(**inputs)
        outputs.loss.backward()
        results.append((outputs.loss, *(p.grad for p in instance.parameters() if p.grad is not None)))
    assert outputs.logits is None
    assert len(results[0]) == len(results[1]) > 10
    for expected, found in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_the_logits_are_never_held(model, half):
    inputs = batch()
    labelled = int((inputs["labels"] != -100).sum())
    assert labelled > 2 * LOGITS_BLOCK
    with LargestTensor() as recorder, torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        model(**inputs).loss.backward()
    blocks = {"block": LOGITS_BLOCK * VOCABULARY * 4, "all labelled": labelled * VOCABULARY * 4}
    assert recorder.bytes <= 1.01 * blocks["block"]
    model.config.sparse_prediction = False
    with LargestTensor() as recorder:
        model(**inputs).loss.backward()
    assert recorder.bytes > blocks["all labelled"]


def test_logits_that_are_returned_are_not_held_in_float32_as_well(model):
    """Half of the positions are labelled; only these are widened for the loss."""
    model.config.sparse_prediction = False
    inputs = batch()
    whole = inputs["labels"].numel() * VOCABULARY * 4
    with LargestTensor() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs)
        outputs.loss.backward()
    assert outputs.logits.shape == (*inputs["labels"].shape, VOCABULARY)
    assert recorder.bytes < 0.6 * whole


def test_evaluation_still_has_the_logits_of_the_labelled_positions(model):
    inputs = batch()
    outputs = model.eval()(**inputs)
    assert outputs.logits.shape == (int((inputs["labels"] != -100).sum()), VOCABULARY)


@pytest.mark.parametrize("sparse", [True, False])
def test_num_items_in_batch_divides_the_sum(model, sparse):
    model.config.sparse_prediction = sparse
    inputs = batch()
    labelled = (inputs["labels"] != -100).sum()
    mean = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, num_items_in_batch=3 * labelled).loss, mean / 3)


def test_accumulated_gradients_are_those_of_the_whole_batch(model, tmp_path):
    """The Trainer leaves the division to the model: two halves of unequal size are the batch."""
    inputs = batch(100)
    rows = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(4)]
    results = []
    for size in (4, 2):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=size, learning_rate=0.1, optim="sgd",
            gradient_accumulation_steps=4 // size, max_grad_norm=0, use_cpu=True, report_to="none", disable_tqdm=True,
            lr_scheduler_type="constant", save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], list(trainer.model.parameters())))
    assert (inputs["labels"][:2] != -100).sum() != (inputs["labels"][2:] != -100).sum()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), results[0][1], strict=True)]
    assert any(moved)
    for whole, halves in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [0.0, -200.0])
def test_half_precision_is_as_near_as_the_plain_loss_in_half_precision(model, bias):
    """Loss and gradients, each within twice the error of the plain path; the loss is no half-precision number."""
    with torch.no_grad():
        model.cls.predictions.bias[1:VOCABULARY:7] = bias
    inputs, found = batch(), {}
    for name, sparse, half in (("exact", False, False), ("plain", False, True), ("ours", True, True)):
        model.config.sparse_prediction = sparse
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert found["ours"][0].dtype == torch.float32
    assert found["ours"][0] != found["ours"][0].bfloat16().float()
    for exact, plain, ours in zip(*(found[name] for name in ("exact", "plain", "ours")), strict=True):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-4 * exact.norm()


def test_a_batch_without_labels_has_zero_loss(model):
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0


def test_the_gradient_of_the_loss_is_its_derivative(monkeypatch):
    """In float64, by finite differences, over several blocks and with a factor on the loss."""
    monkeypatch.setattr(masked_lm_head, "LOGITS_BLOCK", 4)
    states = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 3, 0, 10, 7, 1])

    def loss(*inputs):
        return 0.3 * masked_lm_head._SummedLoss.apply(*inputs, labels, torch.float64)

    assert torch.autograd.gradcheck(loss, (states, weight, bias))
