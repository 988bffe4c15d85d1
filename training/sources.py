"""Sources of stage I: documents as sequences of tokens, mixed, from any position.

Laws: before the first step every source exists, has the columns the recipe names and at least one row; otherwise a
`RecipeError` names the source. Streams never hold a whole source in memory. Of the consumers of a stream (ranks times
data loader workers) exactly one reads a document, and a position, a few numbers, is enough to go on from any sequence.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .recipe import MLMRecipe, RecipeError, Source
from .source_files import check_source, readable, source_files

FORMS = ("cut", "split", "pack")
_ROWS = 16
"""Rows of this consumer tokenised at a time."""


@dataclass
class OpenSource:
    """A source of stage I that was opened and checked, and which side of its held-out split is read.

    Attributes:
        source: The recipe's entry.
        dataset: Its rows, streamed, the one column that is read.
        heldout: Whether to read the documents that `heldout_share` keeps from training, instead of the others.
    """

    source: Source
    dataset: IterableDataset
    heldout: bool = False


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a Hub name, or a `RecipeError` that says why there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"tokenizer={name!r} cannot be loaded: {reason}") from error


def open_sources(
    recipe: MLMRecipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, *, heldout: bool = False
) -> list[OpenSource]:
    """Opens the sources of stage I.

    Args:
        recipe: Gives `data_dir`.
        sources: What to open.
        tokenizer: What tokenised shards are held against.
        heldout: Whether to read the documents that `heldout_share` keeps from training.

    Raises:
        RecipeError: See `check_source`; a weight or share out of range; two sources of one name; shards
            of another tokenizer.
    """
    opened, names = [], set()
    for source in sources:
        if source.weight <= 0:
            raise RecipeError(f"source {source.name}: weight={source.weight} is not above 0.")
        if not 0 <= source.heldout_share < 1:
            raise RecipeError(f"source {source.name}: heldout_share={source.heldout_share} is not in [0, 1).")
        if source.name in names:
            raise RecipeError(f"source {source.name}: the name is used twice.")
        names.add(source.name)
        column = source.tokens or source.text
        dataset = check_source(source, recipe.data_dir, [column])
        if source.tokens is not None and source.path is not None:
            _check_tokenizer(source, recipe.data_dir, tokenizer)
        opened.append(OpenSource(source, dataset.select_columns([column]), heldout))
    return opened


def _check_tokenizer(source: Source, data_dir: str, tokenizer: PreTrainedTokenizerBase):
    """Raises `RecipeError` if the shards say that another tokenizer made them; shards that say nothing pass."""
    file = source_files(source, data_dir)[0]
    metadata = (pq.read_schema(file).metadata if file.suffix == ".parquet" else None) or {}
    entries = int(metadata.get(b"vocab_size", len(tokenizer)))
    if entries != len(tokenizer):
        raise RecipeError(
            f"source {source.name}: its shards are of {metadata.get(b'tokenizer', b'a tokenizer').decode()} with "
            f"{entries} entries, the recipe's tokenizer has {len(tokenizer)}."
        )


def is_heldout(document: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out share: a property of its content, equal in every run.

    >>> sum(is_heldout(str(i).encode(), 0.01) for i in range(10_000))
    105
    """
    return share > 0 and int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") < share * 2**64


class Cutter:
    """Turns documents into sequences of at most `max_length` tokens: [CLS], a piece of one document, [SEP].

    Args:
        recipe: Gives `max_length` and `long_documents`.
        tokenizer: A fast tokenizer with [CLS] and [SEP].

    Raises:
        RecipeError: Another form than cut, split, pack; a length without room for a token.
    """

    def __init__(self, recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase):
        if recipe.long_documents not in FORMS:
            raise RecipeError(f"long_documents={recipe.long_documents!r} is neither 'cut' nor 'split' nor 'pack'.")
        if recipe.max_length < 3:
            raise RecipeError(f"max_length={recipe.max_length} leaves no room between [CLS] and [SEP].")
        self.tokenizer = tokenizer
        self.room = recipe.max_length - 2
        self.cut = recipe.long_documents == "cut"
        # COST: a shuffle buffer holds 2 bytes a token; Python's integers would take 36.
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32

    def texts(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of whole texts without special tokens."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than model_max_length is what we are here for
        )
        return [np.array(ids, dtype=self.dtype) for ids in encoded["input_ids"]]

    def sequences(self, ids: np.ndarray) -> Iterator[dict[str, Any]]:
        """Sequences of one document: `input_ids (length,)`, and `lost`, the tokens that were cut away after it."""
        for start in range(0, len(ids), self.room):
            piece = ids[start : start + self.room]
            whole = np.empty(len(piece) + 2, dtype=self.dtype)
            whole[0], whole[1:-1], whole[-1] = self.tokenizer.cls_token_id, piece, self.tokenizer.sep_token_id
            yield {"input_ids": whole, "lost": len(ids) - len(piece) if self.cut else 0}
            if self.cut:
                return


class SourceReader:
    """One consumer's share of the sequences of one source.

    With at least as many files as consumers each reads files of its own; otherwise the consumers of a file take its
    rows in turn, before anything is tokenised.

    Args:
        opened: The source.
        cutter: Makes sequences of documents.
        consumer: Which of the consumers reads, from 0.
        consumers: How many there are.

    Attributes:
        position: Where the running pass is, after the sequence it gave last; JSON.
    """

    def __init__(self, opened: OpenSource, cutter: Cutter, *, consumer: int = 0, consumers: int = 1):
        self.opened, self.cutter = opened, cutter
        files = opened.dataset.num_shards
        shards = min(files, consumers)
        self._turn, self._turns = consumer // shards, len(range(consumer % shards, consumers, shards))
        dataset = opened.dataset
        if shards > 1:
            dataset = dataset.shard(num_shards=shards, index=consumer % shards, contiguous=False)
        self._dataset = dataset.with_format("arrow")
        self._beginning = {"rows": self._dataset.state_dict(), "row": 0, "given": 0}
        self.position: dict[str, Any] = self._beginning

    def one_pass(self, position: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Sequences from the beginning of the source, or those after a position."""
        position = position or self._beginning
        rows, row, skip = position["rows"], position["row"], position["given"]
        self.position = position
        self._dataset.load_state_dict(rows)
        # TRAP: iterating the data set itself would split it over the data loader's workers a second time.
        for table in readable(self.opened.source, self._dataset.iter(batch_size=_ROWS * self._turns)):
            pieces = itertools.chain.from_iterable(map(self.cutter.sequences, self._documents(table, row)))
            for given, sequence in enumerate(pieces, start=1):
                if given <= skip:
                    continue
                self.position = {"rows": rows, "row": row, "given": given}
                yield sequence
            rows, row, skip = self._dataset.state_dict(), row + len(table), 0

    def _documents(self, table: pa.Table, row: int) -> list[np.ndarray]:
        """Token ids of this consumer's documents among the rows, of which the first is number `row` of the file."""
        source = self.opened.source
        first = (self._turn - row) % self._turns
        if self._turns > 1:
            table = table.take(pa.array(range(first, len(table), self._turns), pa.int64()))
        column = pa.concat_arrays(table.column(0).chunks) if table.num_rows else pa.array([], table.schema.types[0])
        if source.tokens is None:
            texts = [text for text in self._texts(column) if text and text.strip()]
            return self.cutter.texts([text for text in texts if self._is_ours(text.encode())])
        return [ids for ids in self._tokens(column) if len(ids) and self._is_ours(ids.tobytes())]

    def _texts(self, column: pa.Array) -> list[str | None]:
        """The documents of a column of text; `RecipeError` if it holds something else."""
        texts = column.to_pylist()
        for text in texts:
            if not isinstance(text, str | None):
                source = self.opened.source
                raise RecipeError(
                    f"source {source.name}: column {source.text!r} holds {type(text).__name__}, not text."
                )
        return texts

    def _tokens(self, column: pa.Array) -> Iterator[np.ndarray]:
        """Documents of a column of token ids, `(tokens,)` each.

        Raises:
            RecipeError: A column of something else; ids that the tokenizer does not have; special tokens.
        """
        name = f"source {self.opened.source.name}: column {self.opened.source.tokens!r}"
        tokenizer = self.cutter.tokenizer
        lists = isinstance(column, pa.ListArray | pa.LargeListArray)
        if not lists or not pa.types.is_integer(column.type.value_type) or column.values.null_count:
            raise RecipeError(f"{name} holds {column.type}, not lists of token ids.")
        values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
        for start, end in itertools.pairwise(offsets):
            ids = values[start:end]
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
                raise RecipeError(f"{name}: token ids {ids.min()} to {ids.max()}, another tokenizer's.")
            if len(ids) and np.isin(ids[[0, -1]], [tokenizer.cls_token_id, tokenizer.sep_token_id]).any():
                raise RecipeError(f"{name}: a document begins or ends with a special token; they are added here.")
            yield ids.astype(self.cutter.dtype)

    def _is_ours(self, document: bytes) -> bool:
        return is_heldout(document, self.opened.source.heldout_share) == self.opened.heldout


class Mixture:
    """Sequences of several sources, drawn by weight, until each was read to its end at least once.

    A source that ends before the others begins again. Each sequence has the number of its source and of the `visit`,
    how many times its source was begun before.

    Args:
        readers: The sources.
        seed: Of the draws.
        position: Where to go on; None begins.
        visits: Of a new mixture, how many times each source was begun before; None is never.
    """

    def __init__(
        self,
        readers: Sequence[SourceReader],
        *,
        seed: Sequence[int],
        position: dict[str, Any] | None = None,
        visits: Sequence[int] | None = None,
    ):
        position = position or {}
        self._readers, self._seed = readers, list(seed)
        self._drawn: int = position.get("drawn", 0)
        self._ended: list[bool] = list(position.get("ended", [False] * len(readers)))
        self.visits: list[int] = list(position.get("visits", visits or [0] * len(readers)))
        self._places: list[dict | None] = list(position.get("sources", [None] * len(readers)))
        self._passes = [reader.one_pass(place) for reader, place in zip(readers, self._places, strict=True)]

    def position(self) -> dict[str, Any]:
        """Where the mixture is, after the sequence it gave last; JSON."""
        return {
            "drawn": self._drawn,
            "ended": list(self._ended),
            "visits": list(self.visits),
            "sources": list(self._places),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for source in self._draws():
            sequence = next(self._passes[source], None)
            if sequence is None:
                self._ended[source] = True
                if all(self._ended):
                    return
                sequence = self._begin_again(source)
            self._drawn += 1
            self._places[source] = self._readers[source].position
            yield {**sequence, "source": source, "visit": self.visits[source]}

    def _begin_again(self, source: int) -> dict[str, Any]:
        self.visits[source] += 1
        self._passes[source] = self._readers[source].one_pass()
        sequence = next(self._passes[source], None)
        if sequence is None:
            raise RecipeError(no_documents(self._readers[source].opened))
        return sequence

    def _draws(self) -> Iterator[int]:
        """Numbers of sources, the first `drawn` left out."""
        if len(self._readers) == 1:
            yield from itertools.repeat(0)
        weights = np.array([reader.opened.source.weight for reader in self._readers])
        generator = np.random.default_rng(self._seed)
        blocks, skip = divmod(self._drawn, 1000)
        for block in itertools.count():
            draws = generator.choice(len(weights), size=1000, p=weights / weights.sum())
            if block >= blocks:
                yield from draws[skip if block == blocks else 0 :].tolist()


def no_documents(opened: OpenSource) -> str:
    """The message for a source of which a consumer gets nothing."""
    return (
        f"source {opened.source.name}: no document with text for one of the readers. There are fewer documents than "
        "processes x dataloader_num_workers, or heldout_share leaves none."
    )


def sequences(
    recipe: MLMRecipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, *, heldout: bool = False
) -> Iterator[dict[str, Any]]:
    """Sequences of at most `max_length` tokens, mixed from the sources by weight, not shuffled, always in one order.

    Args:
        recipe: Gives `data_dir`, `max_length`, `long_documents` and the seed.
        sources: What to read.
        tokenizer: A fast tokenizer.
        heldout: Whether to read the documents that `heldout_share` keeps from training, instead of the others.

    Returns:
        {"input_ids": list[int], ...}, until every source has ended; see `Mixture` and `Cutter` for the other fields.
    """
    cutter = Cutter(recipe, tokenizer)
    readers = [SourceReader(opened, cutter) for opened in open_sources(recipe, sources, tokenizer, heldout=heldout)]
    mixture = Mixture(readers, seed=[int(recipe.training.get("seed", 42))])
    return ({**sequence, "input_ids": sequence["input_ids"].tolist()} for sequence in mixture)
