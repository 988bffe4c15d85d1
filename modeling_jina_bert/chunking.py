"""`encode_chunks`, late chunking: a text is embedded once as a whole, then the tokens of each chunk are averaged.

Source: Günther et al. 2024, "Late Chunking: Contextual Chunk Embeddings Using Long-Context Embedding Models"
(arXiv 2409.04701), and its released code, jina-ai/late-chunking.

Laws:
1. A token belongs to every span that holds its first character. Tokens before the text ([CLS]) go with its first
   token and tokens after it ([SEP]) with its last, as in the released code. So one span over all of a text gives the
   vector of `encode`, and so does the mean, weighted by tokens, of the chunks of spans that tile the text.
2. A text of more than `max_length` tokens is read in windows of its one token sequence, each of `max_length` tokens
   and beginning `overlap` tokens before the end of the one before. A token is taken from the first window that holds
   it, where it has the most context on its left ("long late chunking" of the paper). [CLS] is in the first window
   only, [SEP] in the last.

COST: one forward pass, and the overlaps a second time. Held at a time: the hidden states of one batch (a window, or
shorter texts of `TOKENS_PER_BATCH` tokens together), one sum a chunk, the tokens of `GROUP_CHARACTERS` characters.
"""

import operator
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .encoding import call_tokenizer, check_text, evaluation_mode, token_budget_batches
from .packing import Sequences

TOKENS_PER_BATCH = 16384
GROUP_CHARACTERS = 2**20

Span = tuple[int, int]
"""[start, end): the end is not included."""

# The first alternative begins only where a run of marks begins: a long row of dots would take quadratic time.
_BOUNDARY = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]]*\s+"""  # noqa: RUF001  ends that white space has to follow
    r"|[。！？｡]+[」』”’）)]*\s*"  # noqa: RUF001  ends that nothing has to follow
    r"|\n\s*\n\s*"  # an empty line
)
_EMPTY_LINE = re.compile(r"\n\s*\n")
_ENUMERATOR = re.compile(r"[\s(\[]*\d{1,3}")
# They hardly ever end a sentence. Single letters, as in initials, "e.g." and "U.S.", are taken for abbreviations, too.
_ABBREVIATIONS = frozenset(
    "al approx ca capt cf col dr gen gov hon lt messrs mr mrs ms mt prof rep rev sen sgt st viz vs".split()
)
_ABBREVIATIONS_BEFORE_DIGITS = frozenset("art ch chap eq eqs fig figs no nos pp ref sec secs tab vol vols".split())


def sentence_spans(text: str) -> list[Span]:
    """Splits a text into sentences by rule.

    A sentence ends after full stop, exclamation mark, question mark or ellipsis and the quotes and brackets that close
    there, if white space follows and then neither a lower-case letter nor more punctuation; after their ideographic
    forms; and at an empty line. It does not end after a known abbreviation ("Dr.", "No. 5"), a single letter, or a
    number that opens it ("1. Introduction"). Sentences tile the text: white space belongs to the one before.

    Args:
        text: Any text.

    Returns:
        Character spans in order; none for an empty text.

    Example:
        >>> text = 'Dr. Who paid 3.5 pounds. "Why?" he asked. (No. 5.) Go!'
        >>> [text[start:end] for start, end in sentence_spans(text)]
        ['Dr. Who paid 3.5 pounds. ', '"Why?" he asked. ', '(No. 5.) ', 'Go!']
    """
    spans = []
    start = 0
    for boundary in _BOUNDARY.finditer(text, len(text) - len(text.lstrip())):
        if boundary.end() < len(text) and _ends_sentence(text, start, boundary):
            spans.append((start, boundary.end()))
            start = boundary.end()
    return [*spans, (start, len(text))] if text else []


def _ends_sentence(text: str, start: int, boundary: re.Match) -> bool:
    """Whether the sentence that began at `start` ends here; more text follows."""
    following, mark = text[boundary.end()], boundary.group().rstrip()
    if _EMPTY_LINE.search(boundary.group()):
        return True
    if following.islower() or following in ".!?…,;:":
        return False
    if mark != ".":
        return True
    if _ENUMERATOR.fullmatch(text, start, boundary.start()):
        return False
    word = re.split(r"\W", text[max(start, boundary.start() - 10) : boundary.start()])[-1].lower()
    if following.isdigit() and word in _ABBREVIATIONS_BEFORE_DIGITS:
        return False
    return word not in _ABBREVIATIONS and not (len(word) == 1 and word.isalpha())


def macro_windows(length: int, max_length: int | None, overlap: int) -> list[tuple[int, int, int]]:
    """The overlapping windows in which a token sequence is read.

    Args:
        length: Tokens of the sequence.
        max_length: Tokens of a window; None is one window for all.
        overlap: Tokens that a window repeats of the one before, less than `max_length`.

    Returns:
        Start, first kept token and end of each window; every token is kept in the first window that holds it.

    Example:
        >>> macro_windows(20, 10, 4)
        [(0, 0, 10), (6, 10, 16), (12, 16, 20)]
    """
    if max_length is None or length <= max_length:
        return [(0, 0, length)] if length else []
    starts = range(0, length - overlap, max_length - overlap)
    return [(start, start + overlap if start else 0, min(start + max_length, length)) for start in starts]


@dataclass(eq=False)
class Chunk:
    """A chunk of a text and its embedding.

    Attributes:
        embedding: `(hidden,) float32`, a numpy array or, under `convert_to_tensor`, a tensor.
        span: The characters [start, end) of the text.
        tokens: The tokens [start, end) that were averaged, counted in `tokenizer(text)["input_ids"]`.
        text: The characters.
    """

    embedding: Any
    span: Span
    tokens: Span
    text: str


class _Tokens:
    """Where the tokens of a text are.

    Args:
        text: The text.
        offsets: Characters [start, end) of each token of the sequence.
        special: 1 for each token of the sequence that the tokenizer added before or after the text.
    """

    def __init__(self, text: str, offsets: list[Span], special: list[int]):
        places = [place for place, is_special in enumerate(special) if not is_special]
        self.length = len(offsets)  # with special tokens
        self.lead = places[0] if places else 0  # special tokens before the text
        # Byte-level tokenizers may count the space before a word as a part of it; the span of the word does not.
        self.starts = [_skip_space(text, *offsets[place]) for place in places]
        self.ends = [offsets[place][1] for place in places]

    def of_characters(self, start: int, end: int) -> Span:
        """The tokens whose first character is in [start, end); an empty span if there are none."""
        return self._with_special(bisect_left(self.starts, start), bisect_left(self.starts, end))

    def runs(self, size: int) -> list[tuple[Span, Span]]:
        """Character and token span of each `size` tokens of the text."""
        runs = [(low, min(low + size, len(self.starts))) for low in range(0, len(self.starts), size)]
        return [((self.starts[low], self.ends[high - 1]), self._with_special(low, high)) for low, high in runs]

    def _with_special(self, low: int, high: int) -> Span:
        if low >= high:
            return 0, 0
        return self.lead + low if low else 0, self.lead + high if high < len(self.starts) else self.length


def _skip_space(text: str, start: int, end: int) -> int:
    word = text[start:end].lstrip()
    return end - len(word) if word else start


@dataclass
class _Document:
    """A text being embedded.

    Attributes:
        text: The text.
        input_ids: Its token ids, special tokens included.
        chunks: Character and token span of each chunk.
        sums: `(chunks, hidden) float32`, sums of the hidden states so far.
    """

    text: str
    input_ids: list[int]
    chunks: list[tuple[Span, Span]]
    sums: torch.Tensor

    def add(self, hidden_states: torch.Tensor, window: tuple[int, int, int]):
        """Adds what a window keeps; `hidden_states` is `(tokens of the window, hidden)`."""
        start, kept, end = window
        for row, (_, (first, last)) in enumerate(self.chunks):
            low, high = max(first, kept), min(last, end)
            if low < high:
                self.sums[row] += hidden_states[low - start : high - start].sum(dim=0, dtype=torch.float32)

    def means(self) -> torch.Tensor:
        """`(chunks, hidden) float32`; 0 for a text without any token, as in `encode`."""
        counts = [max(last - first, 1) for _, (first, last) in self.chunks]
        return self.sums / torch.tensor(counts, dtype=torch.float32, device=self.sums.device)[:, None]

    def with_embeddings(self, embeddings: Iterable) -> list[Chunk]:
        """The chunks, given one embedding for each."""
        rows = zip(embeddings, self.chunks, strict=True)
        return [Chunk(row, span, tokens, self.text[slice(*span)]) for row, (span, tokens) in rows]


_PreTrainedModel: Any = object  # what this is mixed into; Any for the type checker


class EncodeChunksMixin(_PreTrainedModel):
    """Adds `encode_chunks` to an encoder that has `encode`."""

    @torch.inference_mode()
    def encode_chunks(
        self,
        texts: str | Sequence[str],
        spans: str | int | Iterable | None = "sentences",
        *,
        max_length: int | Literal["model"] | None = "model",
        overlap: int = 256,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        convert_to_tensor: bool = False,
    ) -> list[Chunk] | list[list[Chunk]]:
        """Embeds the chunks of texts, each in the context of its whole text (late chunking).

        Args:
            texts: One text or a sequence of texts, empty ones included.
            spans: How a text is cut:

                - "sentences": see `sentence_spans`. A sentence without a token is left out.
                - a number: so many tokens a chunk, special tokens not counted; the last may be shorter. Its characters
                  are those from the start of its first token to the end of its last.
                - pairs (start, end) of characters, in any order; they may overlap. For several texts, a sequence that
                  has such a list for each text.
                - None: one chunk, the whole text. Its embedding is that of `encode`.
            max_length: Tokens that are embedded together, special tokens included; a longer text is read in
                overlapping windows (law 2 of this file). "model" is the limit of `encode`, 8192 in the released
                models; None embeds every text in one piece, however long.
            overlap: Tokens that a window repeats of the one before.
            normalize_embeddings: Scale each embedding to length 1, after `truncate_dim`.
            truncate_dim: Keep the first dimensions only.
            convert_to_tensor: Embeddings are tensors on the device of the model, not numpy arrays.

        Returns:
            The chunks of a text in the order of its spans: one list for a single text, a list of lists for several.
            With "sentences" or a number, a text without a token (empty, or white space) has no chunks.

        Raises:
            ValueError: A text that is no string or has a lone surrogate; spans that are none of the above, out of
                range, reversed or without a token; an overlap that is not less than `max_length`; a truncate_dim out
                of range; a slow tokenizer.
        """
        single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else list(texts)
        cuts = _cuts(texts, spans, single=single)
        window = self._window_tokens(max_length, overlap)
        if truncate_dim is not None and not 0 < truncate_dim <= self.config.hidden_size:
            raise ValueError(f"truncate_dim={truncate_dim} is not in 1 ... {self.config.hidden_size} (hidden_size).")

        results: list[list[Chunk]] = []
        with evaluation_mode(self):
            for group in _groups(texts):
                documents = self._documents([(index, texts[index], cuts[index]) for index in group])
                self._add_hidden_states(documents, window, overlap)
                for document in documents:
                    embeddings = document.means()[:, :truncate_dim]
                    if normalize_embeddings:
                        embeddings = torch.nn.functional.normalize(embeddings, p=2, dim=1)
                    rows = embeddings if convert_to_tensor else embeddings.cpu().numpy()
                    results.append(document.with_embeddings(rows))
        return results[0] if single else results

    def _window_tokens(self, max_length: int | str | None, overlap: int) -> int | None:
        """Tokens of a window, None for no limit; and the errors about the tokenizer."""
        if max_length == "model":
            max_length = self._max_length(None)
        if isinstance(max_length, str):
            raise ValueError(f'max_length={max_length!r} is not a number of tokens, "model" or None.')
        if max_length is not None and not 0 <= overlap < max_length:
            raise ValueError(f"overlap={overlap} tokens is not at least 0 and less than max_length={max_length}.")
        if not self._needed_tokenizer().is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer, which does not tell the characters of its "
                "tokens: assign a fast one (with a tokenizer.json) to model.tokenizer."
            )
        return max_length

    def _documents(self, texts: list[tuple[int, str, Any]]) -> list[_Document]:
        """Tokenises texts, each with its place among all texts and its cut, and finds the tokens of their chunks."""
        columns = call_tokenizer(
            self.tokenizer,
            [text for _, text, _ in texts],
            truncation=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        documents = []
        for row, (index, text, cut) in enumerate(texts):
            tokens = _Tokens(text, columns["offset_mapping"][row], columns["special_tokens_mask"][row])
            chunks = _chunks(text, tokens, cut, index)
            sums = torch.zeros(len(chunks), self.config.hidden_size, device=self._input_device)
            documents.append(_Document(text, columns["input_ids"][row], chunks, sums))
        return documents

    def _add_hidden_states(self, documents: list[_Document], max_length: int | None, overlap: int):
        """Embeds the tokens of the documents, and adds them to the sums of their chunks, batch by batch."""
        windows = [
            (document, window)
            for document in documents
            if document.chunks
            for window in macro_windows(len(document.input_ids), max_length, overlap)
        ]
        lengths = [end - start for _, (start, _, end) in windows]
        for batch in token_budget_batches(lengths, batch_size=len(windows), max_tokens=TOKENS_PER_BATCH):
            input_ids = []
            for document, (start, _, end) in (windows[i] for i in batch):
                input_ids.extend(document.input_ids[start:end])
            sizes = [lengths[i] for i in batch]
            device = self._input_device
            sequences = Sequences.of_lengths(
                self.slopes, sizes, dtype=self.dtype, device=device, sparse=self.config.sparse_attention
            )
            hidden_states = self._hidden_states(sequences, torch.tensor(input_ids, device=device)).split(sizes)
            for of_window, (document, window) in zip(hidden_states, (windows[i] for i in batch), strict=True):
                document.add(of_window, window)


def _groups(texts: Sequence[str]) -> Iterator[list[int]]:
    """Indices of consecutive texts of `GROUP_CHARACTERS` characters together at most, or of one text."""
    group: list[int] = []
    characters = 0
    for index, text in enumerate(texts):
        if group and characters + len(text) > GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
        group.append(index)
        characters += len(text)
    if group:
        yield group


def _cuts(texts: list[str], spans: Any, *, single: bool) -> list[Any]:
    """How each text is cut: None, "sentences", a number, or a list of checked pairs."""
    for index, text in enumerate(texts):
        check_text(f"texts[{index}]", text)
    if single or spans is None or isinstance(spans, str | int):
        return [_cut(spans, text, index) for index, text in enumerate(texts)]
    if len(spans) != len(texts):
        raise ValueError(f"There are {len(texts)} texts, but lists of spans for {len(spans)}.")
    return [_cut(of_text, text, index) for index, (of_text, text) in enumerate(zip(spans, texts, strict=True))]


def _cut(spans: Any, text: str, index: int) -> Any:
    if spans is None or (isinstance(spans, str) and spans == "sentences"):
        return spans
    if isinstance(spans, int) and not isinstance(spans, bool) and spans > 0:
        return spans
    if isinstance(spans, str | int) or not isinstance(spans, Iterable):
        raise ValueError(f'spans={spans!r} is not "sentences", a number of tokens, pairs (start, end) or None.')
    pairs = []
    for position, span in enumerate(spans):
        name = f"spans[{position}] of texts[{index}]"
        try:
            start, end = (operator.index(x) for x in span)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {span!r}, not a pair (start, end) of characters.") from error
        if not 0 <= start < end <= len(text):
            raise ValueError(f"{name} is {(start, end)}, not 0 <= start < end <= {len(text)} characters.")
        pairs.append((start, end))
    return pairs


def _chunks(text: str, tokens: _Tokens, cut: Any, index: int) -> list[tuple[Span, Span]]:
    """Character and token span of each chunk of a text; a given span without a token is an error."""
    if cut is None:
        return [((0, len(text)), (0, tokens.length))]
    if isinstance(cut, int):
        return tokens.runs(cut)
    spans = sentence_spans(text) if cut == "sentences" else cut
    found = [(span, tokens.of_characters(*span)) for span in spans]
    if cut == "sentences":
        return [(span, (first, last)) for span, (first, last) in found if first < last]
    for position, ((start, end), (first, last)) in enumerate(found):
        if first == last:
            name = f"spans[{position}] of texts[{index}]"
            raise ValueError(f"{name} is {(start, end)}, where no token begins: {text[start:end][:40]!r}.")
    return found
