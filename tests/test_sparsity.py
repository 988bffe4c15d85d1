"""What attention leaves out is proven to be below rounding: on random, adversarial and trained queries and keys.

Pins: the bound holds for every row, against exact float64 sums; it is not vacuous (a window one tenth as wide breaks
it); where it cannot hold, everything is computed; off equals on to the rounding of the dtype.
"""

import pytest
import torch
from conftest import REPOSITORY, SHIPPED

from modeling_jina_bert import JinaBertModel, alibi_slopes, count_scores, cpu_products
from modeling_jina_bert.cpu_attention import alibi_attention
from modeling_jina_bert.sparsity import least_window, record_scores, window_bound

LENGTH, HEADS, SIZE, BLOCK = 3000, 4, 16, 256
SCALING = SIZE**-0.5


def scores(query, key, slopes, scaling=SCALING):
    positions = torch.arange(query.shape[1], dtype=torch.float64)
    distance = (positions[:, None] - positions).abs()
    return scaling * query.double() @ key.double().mT - slopes.double()[:, None, None] * distance, distance


def skipped_share(query, key, slopes, window, scaling=SCALING):
    """Largest share of a row's softmax beyond its window, in float64: `(heads,)`."""
    exact, distance = scores(query, key, slopes, scaling)
    of_row = window.repeat_interleave(BLOCK, dim=1)[:, : query.shape[1], None]
    probabilities = exact.softmax(dim=-1)
    return probabilities.masked_fill(distance <= of_row, 0).sum(-1).amax(1)


def adversarial() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(HEADS, LENGTH, SIZE, generator=generator) for _ in range(2))
    cases = {"random": (query, key), "tiny norms": (query * 1e-3, key * 1e-3), "large norms": (query * 4, key * 4)}
    cases["huge norms"] = (query * 100, key * 100)
    far = key.clone()
    far[:, 2900] = 60 * query[:, 0] / query[:, 0].norm(dim=-1, keepdim=True)
    cases["one far dominant key"] = (query, far)
    cases["one far dominant query"] = (torch.cat([query[:, :1] * 60, query[:, 1:]], 1), key)
    cases["all keys share a large offset"] = (query, key + 30)
    cases["constant keys"] = (query, torch.ones_like(key))
    cases["query against its own neighbourhood"] = (-3 * key, 3 * key)
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", adversarial())
def test_the_bound_holds_for_every_row(name, dtype):
    query, key = (x.to(dtype) for x in adversarial()[name])
    slopes = torch.tensor(alibi_slopes(HEADS))
    window = window_bound(query, key, slopes, scaling=SCALING, block=BLOCK, dtype=dtype)
    assert window.shape == (HEADS, -(-LENGTH // BLOCK))
    assert (skipped_share(query, key, slopes, window) <= torch.finfo(dtype).eps / 4).all()


def test_the_bound_is_neither_vacuous_nor_far_off():
    query, key = adversarial()["random"]
    slopes = torch.tensor(alibi_slopes(HEADS))
    window = window_bound(query, key, slopes, scaling=SCALING, block=BLOCK, dtype=torch.float32)
    assert (window[0] < 0.1 * LENGTH).all()
    assert (skipped_share(query, key, slopes, window // 10) > torch.finfo(torch.float32).eps / 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_window_is_below_the_least(dtype):
    """What is not looked at, as the slope alone reaches too far, could not have been left out, and it is near."""
    slopes = torch.tensor(alibi_slopes(HEADS))
    least = least_window(slopes, dtype)[:, None].clamp(max=LENGTH - 1)
    for query, key in adversarial().values():
        assert (window_bound(query, key, slopes, scaling=SCALING, block=BLOCK, dtype=dtype) >= least).all()
    nothing = torch.zeros(HEADS, LENGTH, SIZE)
    found = window_bound(nothing, nothing, slopes, scaling=SCALING, block=BLOCK, dtype=dtype)
    assert (found[:, 1] <= 1.5 * least[:, 0] + 2).all()


def test_a_far_dominant_key_is_seen():
    """With the window of the other keys the output would be wrong by far; the bound widens it."""
    cases = adversarial()
    slopes = torch.tensor(alibi_slopes(HEADS))
    query, key = cases["one far dominant key"]
    plain = window_bound(*cases["random"], slopes, scaling=SCALING, block=BLOCK, dtype=torch.float32)
    assert skipped_share(query, key, slopes, plain)[2] > 0.01
    value = torch.randn(HEADS, LENGTH, SIZE)
    expected = scores(query, key, slopes)[0].softmax(-1) @ value.double()
    found, _ = alibi_attention(
        *(x.transpose(0, 1) for x in (query, key, value)), slopes, torch.tensor([0, LENGTH]), SCALING, True, False
    )
    assert (found.transpose(0, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_norms_out_of_range_leave_nothing_out(value):
    query, key = adversarial()["random"]
    key[:, 7, 3] = value
    slopes = torch.tensor(alibi_slopes(HEADS))
    window = window_bound(query, key, slopes, scaling=SCALING, block=BLOCK, dtype=torch.float32)
    assert (window == LENGTH - 1).all()


def test_without_a_slope_nothing_is_left_out():
    query, key = adversarial()["random"]
    window = window_bound(query, key, torch.zeros(HEADS), scaling=SCALING, block=BLOCK, dtype=torch.float32)
    assert (window == LENGTH - 1).all()


def test_autocast_does_not_round_the_bound():
    """Keys with a large part in common: products in bfloat16 would be off by more than the bound's own slack."""
    query, key = (x + 8 for x in adversarial()["random"])
    slopes = torch.tensor(alibi_slopes(HEADS))
    options = {"scaling": SCALING, "block": BLOCK, "dtype": torch.bfloat16}
    expected = window_bound(query, key, slopes, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (query @ key.mT).dtype == torch.bfloat16
        assert torch.equal(window_bound(query, key, slopes, **options), expected)


def test_counts_are_told_apart():
    """Two that have counted the same are still two."""
    with count_scores() as outer:
        with count_scores() as inner:
            record_scores(10, 5)
        record_scores(10, 5)
    record_scores(10, 5)
    assert (inner.total, outer.total) == (10, 20)


def test_packed_documents_bound_each_other():
    """The lower bound of a denominator may only use keys of the same sequence."""
    query, key = adversarial()["large norms"]
    documents = torch.zeros(LENGTH, dtype=torch.int64)
    documents[1001:] = 1  # inside a block of local keys
    slopes = torch.tensor(alibi_slopes(HEADS))
    window = window_bound(
        query, key, slopes, scaling=SCALING, block=BLOCK, dtype=torch.float32, documents=documents
    ).repeat_interleave(BLOCK, dim=1)[:, :LENGTH, None]
    exact, distance = scores(query, key, slopes)
    exact = exact.masked_fill(documents[:, None] != documents, -torch.inf)
    skipped = exact.softmax(-1).masked_fill(distance <= window, 0).sum(-1)
    assert (skipped <= torch.finfo(torch.float32).eps / 4).all()


@pytest.mark.parametrize("name", adversarial())
def test_on_equals_off(name):
    """Values and gradients to the rounding of float32; several sequences, one of them too short to be looked at."""
    query, key = (x.transpose(0, 1) for x in adversarial()[name])
    value, weights = torch.randn(2, LENGTH, HEADS, SIZE)
    slopes = torch.tensor(alibi_slopes(HEADS))
    offsets = torch.tensor([0, 2100, 2110, LENGTH])

    def run(sparse: bool, dtype: torch.dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        with count_scores() as count:
            context, _ = alibi_attention(*inputs, slopes.to(dtype), offsets, SCALING, sparse, True)
        return count, (context, *torch.autograd.grad((context * weights).sum(), inputs))

    _, exact = run(False, torch.float64)
    all_scores, off = run(False, torch.float32)
    kept_scores, on = run(True, torch.float32)
    assert all_scores.skipped_share == 0
    assert kept_scores.total == all_scores.total == all_scores.computed
    if name == "random":
        assert kept_scores.skipped_share > 0.15
    if name == "huge norms":
        assert kept_scores.skipped_share == 0
    for reference, without, with_skipping in zip(exact, off, on, strict=True):
        # The sums behind a gradient have terms of the size of the keys, whatever they cancel to.
        scale = torch.finfo(torch.float32).eps * max(1.0, reference.abs().max().item(), key.abs().max().item())
        assert (with_skipping - reference).abs().max() <= 2 * (without - reference).abs().max() + 16 * scale


@pytest.mark.parametrize("name", adversarial())
def test_on_equals_off_by_products(name, monkeypatch):
    """bfloat16, where attention is batched products: values and gradients as near to the exact ones as all scores."""
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: True)
    query, key = (x.transpose(0, 1).bfloat16() for x in adversarial()[name])
    value, weights = torch.randn(2, LENGTH, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    slopes = torch.tensor(alibi_slopes(HEADS))
    offsets = torch.tensor([0, 2100, 2110, LENGTH])

    def run(sparse: bool, dtype: torch.dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        of_dtype = torch.promote_types(dtype, torch.float32)
        with count_scores() as count:
            context, _ = alibi_attention(*inputs, slopes.to(of_dtype), offsets, SCALING, sparse, True)
        return count, (context, *torch.autograd.grad((context.to(of_dtype) * weights).sum(), inputs))

    _, exact = run(False, torch.float64)
    all_scores, off = run(False, torch.bfloat16)
    kept_scores, on = run(True, torch.bfloat16)
    assert all_scores.skipped_share == 0
    if name == "random":
        assert kept_scores.skipped_share > 0.15
    for reference, without, with_skipping in zip(exact, off, on, strict=True):
        scale = torch.finfo(torch.bfloat16).eps * max(1.0, reference.abs().max().item())
        assert (with_skipping - reference).abs().max() <= 1.1 * (without - reference).abs().max() + scale


@torch.no_grad()
def test_the_trained_model_on_a_whole_book():
    """A real text of more than 8192 tokens: what is skipped, and that the embedding is the same without skipping."""
    model = JinaBertModel.from_pretrained(SHIPPED)
    text = (REPOSITORY / "evaluation" / "demo_library" / "book-flatland.txt").read_text(encoding="utf-8")
    vectors, counts = [], []
    for sparse in (True, False):
        model.config.sparse_attention = sparse
        with count_scores() as count:
            vectors.append(model.encode(text, truncation=False, convert_to_tensor=True))
        counts.append(count)
    assert counts[1].skipped_share == 0
    assert counts[0].skipped_share > 0.3
    assert counts[0].total > 4 * 4 * 8192**2
    assert (vectors[0] - vectors[1]).abs().max() < 1e-5 * vectors[1].abs().max()
