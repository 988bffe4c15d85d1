"""The training stream of stage I: every consumer's share of the sequences, shuffled, without end, from any place.

Laws: the order is a function of (seed, consumer, number of consumers) alone, and a stream that is built at a position
of another gives exactly what that one gives next. The order with one consumer is that of interleave_datasets(...,
"all_exhausted").shuffle(seed) of datasets 5.2, written down here because it differs between releases of datasets.

COST: a position does not hold the content of the shuffle buffer but says where the oldest sequence in it was read. A
resumed stream reads and tokenises from there: about log2(buffer size) times half the buffer, not the whole corpus.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .recipe import MLMRecipe, RecipeError
from .sources import Cutter, Mixture, OpenSource, SourceReader, no_documents


class ShuffleBuffer:
    """Shuffles a mixture: fills a buffer, gives out half of it in random order, fills it up again, and so on.

    Which of the sequences read so far are in the buffer follows from the seed, so that it can be worked out with
    numbers only, and those sequences read again.

    Args:
        open_mixture: Makes the mixture at a position, or at its beginning for None.
        size: Sequences held.
        seed: Of the order.
        position: Where to go on; None begins.
    """

    def __init__(
        self,
        open_mixture: Callable[[dict[str, Any] | None], Mixture],
        size: int,
        *,
        seed: Sequence[int],
        position: dict[str, Any] | None = None,
    ):
        position = position or {"refill": 0, "given": 0, "read": 0, "mixture": None}
        self._open_mixture, self._size, self._seed = open_mixture, size, list(seed)
        self._refill: int = position["refill"]  # fillings before this one
        self._given: int = position["given"]  # sequences given out of this one
        # Where fillings began, (sequences read before, position of the mixture), from the oldest still in the buffer.
        self._starts: deque[tuple[int, dict | None]] = deque([(position["read"], position["mixture"])])
        self.visits: list[int] = []

    def position(self) -> dict[str, Any]:
        """Where the buffer is, after the sequence it gave last; JSON."""
        read, mixture = self._starts[0]
        return {"refill": self._refill, "given": self._given, "read": read, "mixture": mixture}

    @property
    def _fresh(self) -> int:
        """Sequences that a filling after the first one reads, and that one filling gives out."""
        return self._size - self._size // 2

    def _read_before(self, refill: int) -> int:
        return self._size + (refill - 1) * self._fresh if refill else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = np.random.default_rng(self._seed)
        numbers = self._kept_numbers(generator)
        mixture, sequences, kept = self._read_again(numbers)
        while True:
            read = self._read_before(self._refill)
            self._starts.append((read, mixture.position()))
            held = [*kept, *itertools.islice(sequences, self._size - len(kept))]
            numbers = np.append(numbers, np.arange(read, read + len(held) - len(kept)))
            self._forget_before(numbers.min(initial=read))
            order = generator.permutation(len(held))
            ended = len(held) < self._size
            for index in order[self._given : None if ended else self._fresh]:
                self._given += 1
                yield held[index]
            if ended:
                self.visits = mixture.visits
                return
            rest = order[self._fresh :]
            kept, numbers = [held[index] for index in rest], numbers[rest]
            self._refill, self._given = self._refill + 1, 0

    def _kept_numbers(self, generator: np.random.Generator) -> np.ndarray:
        """Which sequences, in the order of reading, are in the buffer when this filling begins."""
        numbers = np.empty(0, dtype=np.int64)
        for refill in range(self._refill):
            read = self._read_before(refill)
            held = np.append(numbers, np.arange(read, read + self._size - len(numbers)))
            numbers = held[generator.permutation(self._size)[self._fresh :]]
        return numbers

    def _read_again(self, numbers: np.ndarray) -> tuple[Mixture, Iterator[dict[str, Any]], list[dict[str, Any]]]:
        """The mixture where this filling begins, and the sequences of these numbers."""
        first, position = self._starts[0]
        mixture = self._open_mixture(position)
        sequences = iter(mixture)
        wanted, found = set(numbers.tolist()), {}
        beginnings = {self._read_before(refill) for refill in range(self._refill)}
        for number in range(first, self._read_before(self._refill)):
            if number in beginnings and number > first:
                self._starts.append((number, mixture.position()))
            sequence = next(sequences)
            if number in wanted:
                found[number] = sequence
        return mixture, sequences, [found[number] for number in numbers.tolist()]

    def _forget_before(self, oldest: int):
        while len(self._starts) > 1 and self._starts[1][0] <= oldest:
            self._starts.popleft()


class SequenceStream:
    """The shuffled sequences of one consumer, epoch after epoch.

    An epoch ends when every source was read to its end; the next one is shuffled differently.

    Args:
        opened: The sources.
        recipe: Gives `max_length`, `long_documents`, `shuffle_buffer` and the seed.
        tokenizer: A fast tokenizer.
        consumer: Which of the consumers this is, from 0.
        consumers: How many there are.
        position: Where to go on; None begins.
    """

    def __init__(
        self,
        opened: Sequence[OpenSource],
        recipe: MLMRecipe,
        tokenizer: PreTrainedTokenizerBase,
        *,
        consumer: int = 0,
        consumers: int = 1,
        position: dict[str, Any] | None = None,
    ):
        if recipe.shuffle_buffer < 1:
            raise RecipeError(f"shuffle_buffer={recipe.shuffle_buffer} is below 1 (1 does not shuffle).")
        cutter = Cutter(recipe, tokenizer)
        self._readers = [SourceReader(one, cutter, consumer=consumer, consumers=consumers) for one in opened]
        self._consumer, self._size = consumer, recipe.shuffle_buffer
        self._seed = int(recipe.training.get("seed", 42))
        position = position or {"epoch": 0, "visits": [0] * len(opened), "buffer": None}
        self._epoch: int = position["epoch"]
        self._visits: list[int] = position["visits"]
        self._buffer = self._shuffled(position["buffer"])

    def position(self) -> dict[str, Any]:
        """Where the stream is, after the sequence it gave last; JSON."""
        return {"epoch": self._epoch, "visits": list(self._visits), "buffer": self._buffer.position()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            empty = True
            for sequence in self._buffer:
                empty = False
                yield sequence
            if empty and self._epoch_is_new:
                raise RecipeError(no_documents(self._readers[0].opened))
            self._epoch, self._visits = self._epoch + 1, [visits + 1 for visits in self._buffer.visits]
            self._buffer = self._shuffled(None)

    def _shuffled(self, position: dict[str, Any] | None) -> ShuffleBuffer:
        # NOTE: numpy reads [42, 0, 0] as 42: the first consumer's first epoch has the order of the plain seed.
        seed = [self._seed, self._epoch, self._consumer]

        def open_mixture(place: dict[str, Any] | None) -> Mixture:
            return Mixture(self._readers, seed=seed, position=place, visits=self._visits)

        self._epoch_is_new = position is None
        return ShuffleBuffer(open_mixture, self._size, seed=seed, position=position)
