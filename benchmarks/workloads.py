"""What is computed: the shapes of the models, the batches of every length, and the operations they need.

Law: every system sees the same texts, and only real tokens are counted. A system that computes padding gets mixed
lengths as sentence-transformers would send them: sorted by length, 32 a batch (`padded_batches`); ours as `encode`
computes them, but what it would do in a batch or two is one (`packed_batches`).
Needs neither torch nor numpy until a batch is made, so that the command itself stays small.
"""

import random
from dataclasses import dataclass

VOCABULARY = 30528
INITIALIZER_RANGE = 0.05
"""Standard deviation of the random weights. With the usual 0.02 the attention scores are almost constant, and the
skipping of negligible scores would look better than on trained weights."""
SEED = 0
MIX, CORPUS = "mix", "corpus"
MIX_SEQUENCES = {MIX: 64, CORPUS: 512}
"""Sequences of a call: of a batch or two, and of enough that texts of a batch are of one length nearly."""
PADDED_BATCH = 32
"""Sequences a batch of systems that compute padding: the default of sentence-transformers' `encode`."""
PACKED_TOKENS = 16384
"""Tokens a batch of ours, at most: the default of `JinaBertModel.encode`, which takes 32 sequences, too."""
MIX_MEDIAN, MIX_SIGMA, MIX_RANGE = 96, 1.1, (8, 2048)
"""Log-normal lengths of the mix, in tokens, and what they are clipped to."""
DEFAULT_LENGTHS: tuple[int | str, ...] = (32, 128, 512, MIX, 2048, 8192, 32768)
LENGTH_RANGE = (2, 131072)


@dataclass(frozen=True)
class Shape:
    """Layers, hidden width, heads and intermediate width (of one half of a gated linear unit) of a model."""

    layers: int
    hidden: int
    heads: int
    intermediate: int


SHAPES = {
    "tiny": Shape(4, 256, 4, 1024),
    "small": Shape(4, 512, 8, 2048),
    "base": Shape(12, 768, 12, 3072),
}


@dataclass(frozen=True)
class Workload:
    """One call: its name (the length, or "mix") and the tokens of each sequence, right-padded to the longest."""

    name: int | str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens of a call."""
        return sum(self.lengths)


def parse_length(text: str) -> int | str:
    """A length of the command line: tokens a sequence, or the name of a mix of lengths.

    Raises:
        ValueError: Neither.

    Example:
        >>> parse_length("512"), parse_length("mix")
        (512, 'mix')
    """
    if text in MIX_SEQUENCES:
        return text
    lowest, highest = LENGTH_RANGE
    if not text.isascii() or not text.isdigit() or not lowest <= int(text) <= highest:
        raise ValueError(f"unknown length {text!r}: a whole number from {lowest} to {highest}, {MIX!r} or {CORPUS!r}.")
    return int(text)


def make_workload(name: int | str, tokens: int) -> Workload:
    """The workload of a length.

    Args:
        name: Tokens a sequence; or "mix", 64 sequences of log-normal lengths, the same in every run; "corpus", 512.
        tokens: Tokens of a call, about; one sequence at least. The mix has its own number.

    Example:
        >>> make_workload(512, 4096).lengths
        (512, 512, 512, 512, 512, 512, 512, 512)
        >>> make_workload("mix", 4096).tokens
        10829
    """
    if isinstance(name, int):
        return Workload(name, (name,) * max(1, tokens // name))
    generator = random.Random(SEED)
    drawn = (MIX_MEDIAN * generator.lognormvariate(0, MIX_SIGMA) for _ in range(MIX_SEQUENCES[name]))
    lowest, highest = MIX_RANGE
    return Workload(name, tuple(min(max(round(length), lowest), highest) for length in drawn))


def packed_batches(lengths) -> list[tuple[int, ...]]:
    """The lengths of each batch of a call, for a system that computes no padding.

    Example:
        >>> [len(batch) for batch in packed_batches([512] * 8 + [8000] * 3)]
        [2, 9]
    """
    from modeling_jina_bert.encoding import token_budget_batches

    if sum(lengths) <= PACKED_TOKENS:
        return [tuple(lengths)]
    batches = token_budget_batches(lengths, batch_size=PADDED_BATCH, max_tokens=PACKED_TOKENS)
    return [tuple(lengths[index] for index in batch) for batch in batches]


def padded_batches(lengths) -> list[tuple[int, ...]]:
    """The lengths of each batch of a call, for a system that computes padding.

    Example:
        >>> padded_batches([512] * 8)
        [(512, 512, 512, 512, 512, 512, 512, 512)]
        >>> [len(batch) for batch in padded_batches([8] * 40 + [512])], padded_batches([8] * 40 + [512])[0][:2]
        ([32, 9], (512, 8))
    """
    if len(set(lengths)) == 1:
        return [tuple(lengths)]
    ordered = sorted(lengths, reverse=True)
    return [tuple(ordered[start : start + PADDED_BATCH]) for start in range(0, len(ordered), PADDED_BATCH)]


def make_batch(lengths):
    """The arrays of a call.

    Args:
        lengths: Real tokens of each sequence.

    Returns:
        `input_ids` and `attention_mask`, both `(batch, longest) int64`, id 0 and mask 0 at the padding on the right.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    attention_mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    input_ids = generator.integers(1000, VOCABULARY, size=attention_mask.shape, dtype=np.int64)
    return input_ids * attention_mask, attention_mask


def linear_products(shape: Shape) -> list[tuple[int, int]]:
    """(in, out) features of the products of one layer: query, key, value, output, both halves of the gate, down."""
    projections = [(shape.hidden, shape.hidden)] * 4
    return [*projections, (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)]


def linear_operations(shape: Shape, tokens: int) -> int:
    """Floating point operations of the linear layers, two for a multiply-add."""
    return 2 * tokens * shape.layers * sum(rows * columns for rows, columns in linear_products(shape))


def attention_operations(shape: Shape, lengths) -> int:
    """Floating point operations of both products of attention when every score is computed."""
    return 4 * shape.layers * shape.hidden * sum(length * length for length in lengths)


def operations(shape: Shape, lengths, *, gated: bool = True) -> int:
    """Matrix operations of a call, all scores of attention and no padding counted; a plain BERT has no gate.

    Example:
        >>> operations(SHAPES["base"], (512,)) / 512 / 1e6  # millions a token
        245.366784
    """
    linear = linear_operations(shape, sum(lengths))
    if not gated:
        linear -= 2 * sum(lengths) * shape.layers * shape.hidden * shape.intermediate
    return linear + attention_operations(shape, lengths)
