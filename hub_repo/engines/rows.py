"""The table of engines: what each is given, when it counts as agreeing with torch, and how the table is written.

Law: an engine agrees if its vectors are within its tolerance of torch's and outside it for the same model with
disturbed weights: a comparison that both pass says nothing. How long a text an engine takes is found by texts of which
each is the beginning of the next, with other words added: the vector tells how far the text was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from modeling_jina_bert import JinaBertModel

from ..folders.checkpoint_files import FolderError
from ..formats.parity import LENGTHS, Batch, Tolerance, agreement, torch_embeddings

RUNGS = (512, 2048, 8192, 10_240)
"""Tokens of the texts that show how much of a text an engine reads; the last is above what the model is sold for."""
TEXTS = ("How is the weather today?", "Ünïcödé, it's 12.5 % (of naïve café-goers)!", "日本語 and 中文 mixed", "don't")
"""Texts of several scripts: they are compared as vectors, and by llama.cpp's tokens."""
_LONGEST_REASON = 300  # characters; engines.json has all of it
_WORDS_OF_A_RUNG = 8  # few, so that each part of the text moves the vector visibly


@dataclass
class Row:
    """An engine's line of the table.

    Attributes:
        engine: Its name and precision.
        version: Of the package that a user installs.
        megabytes: Of its file or files.
        error: Largest difference of a component of the embeddings (length 1) from torch's.
        cosine: Smallest cosine to torch's.
        control: Smallest cosine to the vectors of the model with disturbed weights; None for torch.
        agrees: Whether it is within its tolerance and the control is not.
        reach: The longest of the texts of `RUNGS` it reads whole, and what it does with longer ones; "" if not asked.
        speed: Length in tokens -> tokens per second.
        relative: Length in tokens -> speed divided by torch's, measured next to it.
    """

    engine: str
    version: str
    megabytes: float
    error: float
    cosine: float
    control: float | None
    agrees: bool
    reach: str = ""
    speed: dict[int, float] = field(default_factory=dict)
    relative: dict[int, float] = field(default_factory=dict)


def row_of(fields: dict) -> Row:
    """A row that was written as JSON, whose keys are text."""
    lengths = {name: {int(key): value for key, value in fields[name].items()} for name in ("speed", "relative")}
    return Row(**{**fields, **lengths})


@dataclass(frozen=True)
class Missing:
    """An engine that was not run, and why."""

    engine: str
    reason: str


@dataclass(frozen=True)
class Check:
    """Batches with the vectors that torch computes for them.

    Attributes:
        batches: What the engines are given.
        expected: `(batch, hidden) float32` of each.
        control: The same from the model with disturbed weights.
    """

    batches: list[Batch]
    expected: list[np.ndarray]
    control: list[np.ndarray]

    @classmethod
    def of(cls, model: JinaBertModel, twin: JinaBertModel, batches: Sequence[Batch]) -> "Check":
        """Computes both; `twin` is the disturbed model."""
        vectors = [[torch_embeddings(x, batch) for batch in batches] for x in (model, twin)]
        return cls(list(batches), *vectors)

    def row(self, engine: str, version: str, size: int, found: Sequence[np.ndarray], tolerance: Tolerance) -> Row:
        """The row of an engine, without its speed.

        Args:
            engine: Its name.
            version: Of its package.
            size: Of its files, in bytes.
            found: Its vectors, one array a batch.
            tolerance: How far it may be off.
        """
        result, control = agreement(found, self.expected), agreement(found, self.control)
        agrees = result.within(tolerance) and not control.within(tolerance)
        return Row(engine, version, size / 1e6, result.error, result.cosine, control.cosine, agrees)


def whole_words(model: JinaBertModel) -> list[str]:
    """Words of the vocabulary that are one token each, wherever they stand.

    Raises:
        FolderError: There are fewer than ten.
    """
    words = sorted(
        x for x in model.tokenizer.get_vocab() if x.isascii() and x.isalpha() and x.islower() and len(x) > 2
    )
    if len(words) < 10:
        raise FolderError(
            f"the vocabulary has {len(words)} whole words: no texts of a given length can be made of it."
        )
    return words


def word_text(words: Sequence[str], length: int, generator: np.random.Generator) -> str:
    """A text of `length` tokens, [CLS] and [SEP] included; `length` is at least 2."""
    return " ".join(generator.choice(words, length - 2))


def rung_texts(words: Sequence[str], rungs: Sequence[int] = RUNGS) -> list[str]:
    """Texts of so many tokens, each the beginning of the next, which goes on in other words.

    Args:
        words: Of one token each.
        rungs: Tokens, ascending, [CLS] and [SEP] included.

    Example:
        >>> [len(text.split()) for text in rung_texts(["ant", "bee"], (4, 7))]
        [2, 5]
    """
    generator = np.random.default_rng(3)
    text: list[str] = []
    texts = []
    for start, end in pairwise((2, *rungs)):
        own = generator.choice(words, _WORDS_OF_A_RUNG)
        text += [str(word) for word in generator.choice(own, end - start)]
        texts.append(" ".join(text))
    return texts


def check_texts(words: Sequence[str]) -> list[list[str]]:
    """Batches of texts: the mixed one first, with several scripts and no text at all, then one for each length."""
    generator = np.random.default_rng(2)
    singles = [[word_text(words, length, generator)] for length in LENGTHS]
    return [[*TEXTS, "", word_text(words, 129, generator)], *singles]


def tokenized(model: JinaBertModel, texts: Sequence[str]) -> Batch:
    """The token ids of whole texts, padded on the right."""
    return dict(model.tokenizer(list(texts), padding=True, return_tensors="np", return_token_type_ids=True))


def first_of_each(engines: Sequence[str]) -> set[str]:
    """One name of each engine, whatever its precisions: how far it reads is asked once, for it takes long.

    Example:
        >>> sorted(first_of_each(["fastembed, fp32", "fastembed, int8", "torch, float32"]))
        ['fastembed, fp32', 'torch, float32']
    """
    return set({name.split(",")[0]: name for name in reversed(engines)}.values())


def reach(found: Sequence[np.ndarray | str], whole: Sequence[np.ndarray], tolerance: Tolerance) -> str:
    """How much of a text an engine reads, in words.

    Args:
        found: Its vectors `(1, hidden)` of the texts of `RUNGS`; text in place of one is its error.
        whole: Torch's.
        tolerance: Of the engine.

    Example:
        >>> whole = [np.array([[1.0, 0.0]]), np.array([[0.8, 0.6]])]
        >>> reach(whole[:1] + whole[:1], whole, Tolerance(1e-3, 0.999))
        '512, cuts the rest'
        >>> reach([whole[0], "out of memory"], whole, Tolerance(1e-3, 0.999))
        '512, then an error'
    """
    good = "none"
    for index, (vector, rung) in enumerate(zip(found, RUNGS, strict=False)):
        if isinstance(vector, str):
            return f"{good}, then an error"
        # An int8 file is off by more than some texts differ: the nearest text is the one that it read.
        nearest = int(np.argmin([np.abs(vector - other).max() for other in whole[: index + 1]]))
        if not agreement([vector], [whole[nearest]]).within(tolerance):
            return f"{good}, then other vectors"
        if nearest != index:
            return f"{RUNGS[nearest]:,}, cuts the rest"
        good = f"{rung:,}"
    return f"{good} and more"


def table(rows: Sequence[Row], missing: Sequence[Missing], lengths: Sequence[int]) -> str:
    """Rows and what is missing as a Markdown table; the first row is torch's."""
    speeds = [f"tokens/s at {length:,} (of torch's)" for length in lengths]
    titles = ["engine", "version", "file, MB", "largest error", "cosine", "agrees", "reads, tokens", *speeds]
    lines = [
        "| " + " | ".join(titles) + " |",
        "|---|---|---:|---:|---:|---|---|" + "---:|" * len(lengths),
        *("| " + " | ".join(_cells(row, lengths)) + " |" for row in rows),
        *(f"| {x.engine} | not available: {_one_line(x.reason)} |" + " |" * (len(titles) - 2) for x in missing),
    ]
    return "\n".join(lines)


def _cells(row: Row, lengths: Sequence[int]) -> list[str]:
    agrees = ["-", "-", "-"] if row.control is None else [f"{row.error:.1e}", f"{row.cosine:.7f}", _yes(row.agrees)]
    speeds = [f"{row.speed[x]:,.0f} ({row.relative[x]:.2f})" if x in row.speed else "-" for x in lengths]
    return [row.engine, row.version, f"{row.megabytes:.1f}", *agrees, row.reach or "-", *speeds]


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "**no**"


def _one_line(text: str) -> str:
    """No line break and no bar, either of which would end the cell; of a long text the end, which names the cause."""
    return " ".join(text.split()).replace("|", "/")[-_LONGEST_REASON:]
