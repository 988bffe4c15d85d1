"""`encode`: text -> token ids -> hidden states -> one vector a text (masked mean over the tokens).

Law: the vector of a text does not depend on the batch it was computed in. Batches are filled by a budget of tokens
from texts sorted by token length, and packed: no padding is computed. The next texts are tokenised meanwhile.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig

from .packing import Sequences

logger = logging.getLogger(__name__)

_OUTPUT_VALUES = ("sentence_embedding", "token_embeddings")
_WINDOW = 2048  # texts tokenised in one call, and sorted by length among themselves
_FIRST_WINDOW = 256  # those that nothing can be computed beside
_WINDOW_CHARACTERS = 2**22  # of a window, but for a text that is longer by itself


def mean_pooling(token_embeddings: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token embeddings over the valid tokens, accumulated in float32.

    Args:
        token_embeddings: `(batch, length, hidden)`, any float dtype.
        attention_mask: `(batch, length)`, 1 at valid tokens.

    Returns:
        `(batch, hidden) float32`; exactly 0 for a row without a valid token.

    Example:
        >>> mean_pooling(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    mask = attention_mask.unsqueeze(-1).float()
    return (token_embeddings.float() * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def token_budget_batches(lengths: Sequence[int], *, batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of the texts of each batch, longest texts first.

    Args:
        lengths: Tokens of each text.
        batch_size: Texts in a batch at most.
        max_tokens: Tokens in a batch at most; a single text may be longer.

    Yields:
        Lists of indices; texts of a batch are neighbours in length.

    Example:
        >>> list(token_budget_batches([5, 100, 5, 6], batch_size=32, max_tokens=12))
        [[1], [3, 0], [2]]
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or tokens + lengths[index] > max_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


@dataclass
class TruncationCount:
    """What the calls of `encode` inside `count_truncations` have cut off.

    Attributes:
        texts: Texts that were longer than the maximum length.
        tokens: Their tokens beyond it, which are not embedded.
    """

    texts: int = 0
    tokens: int = 0


_truncations: ContextVar[tuple[TruncationCount, ...]] = ContextVar("truncations", default=())


@contextmanager
def count_truncations() -> Iterator[TruncationCount]:
    """Counts what `encode` truncates inside the block, in this thread, in place of its warning.

    Example:
        >>> with count_truncations() as count:
        ...     pass
        >>> count
        TruncationCount(texts=0, tokens=0)
    """
    count = TruncationCount()
    token = _truncations.set((*_truncations.get(), count))
    try:
        yield count
    finally:
        _truncations.reset(token)


def check_text(name: str, text: object):
    """Refuses what no tokenizer takes.

    Args:
        name: Of the text, for the error.
        text: Any string of Unicode characters is right.

    Raises:
        ValueError: It is no string, or has half of a surrogate pair, which is no character and has no UTF-8.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: a lone surrogate, {text[error.start]!r}, at character {error.start}. "
            "Decode bytes with errors='replace'."
        ) from None


def _load_tokenizer(name_or_path: str, config: PreTrainedConfig, hub_arguments: dict[str, Any]):
    """The tokenizer of a folder or, at the commit of the weights, of a repository.

    Args:
        name_or_path: Where the weights came from.
        config: Of the model.
        hub_arguments: What `from_pretrained` was given beside it: subfolder, token, cache_dir, ...

    Raises:
        ValueError: It cannot be read, or it has no vocabulary (transformers makes one of special tokens where the
            files are missing, with which every word is [UNK]), or more tokens than the word embedding has rows.
    """
    try:
        # With the configuration at hand nothing asks for the trust that loading this model has already taken.
        if (commit := getattr(config, "_commit_hash", None)) is not None:
            hub_arguments = {**hub_arguments, "revision": commit}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, config=config, **hub_arguments)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # tokenizers raises bare Exception
        message = " ".join(str(error).split())
        raise ValueError(
            f"{name_or_path}: the tokenizer (tokenizer.json) is missing or cannot be read: {message}"
        ) from error
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{name_or_path} has no tokenizer: without tokenizer.json or vocab.txt there are special tokens only."
        )
    if (largest := max(vocabulary.values())) >= config.vocab_size:
        raise ValueError(f"{name_or_path}: the tokenizer has token {largest}, the embedding {config.vocab_size} rows.")
    return tokenizer


_PreTrainedModel: Any = object  # what this is mixed into; Any for the type checker


class EncodeMixin(_PreTrainedModel):
    """Adds `encode` and the lazily loaded `tokenizer` to the encoder."""

    _tokenizer = None
    _hub_arguments: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    def _loaded_with(self, hub_arguments: dict[str, Any]):
        arguments = {name: value for name, value in hub_arguments.items() if name != "force_download"}
        token = arguments.pop("token", None)
        self._hub_arguments = arguments
        if token is not None:
            _tokens[self] = token

    @property
    def tokenizer(self):
        """The tokenizer beside the weights, loaded on first use; None for a model built in memory, until assigned.

        Raises:
            ValueError: There is none, it cannot be read, or it does not fit the model.
        """
        if self._tokenizer is None and self.name_or_path:
            token = {"token": _tokens[self]} if self in _tokens else {}
            self._tokenizer = _load_tokenizer(self.name_or_path, self.config, {**self._hub_arguments, **token})
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def encode(
        self,
        sentences: str | list[str],
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: torch.device | str | None = None,
        normalize_embeddings: bool = False,
        *,
        truncate_dim: int | None = None,
        max_tokens_per_batch: int = 16384,
        **tokenizer_kwargs,
    ) -> np.ndarray | torch.Tensor | list[torch.Tensor]:
        """Embeds texts; the signature and defaults are those of the official code.

        Args:
            sentences: One text or a list of texts, empty strings included.
            batch_size: Texts in a batch at most.
            show_progress_bar: Progress in texts; None shows it when the log level is INFO or lower.
            output_value: "sentence_embedding", or "token_embeddings" for the hidden states of each text.
            convert_to_numpy: Return a numpy array (False: a list of tensors).
            convert_to_tensor: Return one tensor; wins over `convert_to_numpy`.
            device: Moves the model there first.
            normalize_embeddings: Scale each embedding to length 1, after `truncate_dim`.
            truncate_dim: Keep the first dimensions only.
            max_tokens_per_batch: Tokens of a batch at most; a longer text is a batch of its own.
            **tokenizer_kwargs: For the tokenizer, such as `add_special_tokens`. `max_length` is by default the smaller
                of the tokenizer's `model_max_length` and the configuration's (8192 in the released models); texts
                beyond are truncated with one warning (or counted, see `count_truncations`), or embedded whole under
                `truncation=False`.

        Returns:
            `(texts, hidden) float32`, `(hidden,)` for a single text. For "token_embeddings" a list of `(length,
            hidden)`.

        Raises:
            ValueError: An input that is no text, or has a lone surrogate; no tokenizer that fits; an unknown
                output_value; a truncate_dim or max_length out of range.
            TypeError: An argument that neither this method nor the tokenizer has.
        """
        single = isinstance(sentences, str)
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        self._check_encode_arguments(sentences, output_value, truncate_dim)
        if device is not None:
            with torch.inference_mode(False):  # parameters that are moved under it could not be trained again
                self.to(device)
        results = self._encode_texts(
            sentences, output_value, batch_size=batch_size, max_tokens=max_tokens_per_batch,
            to_cpu=convert_to_numpy and not convert_to_tensor,
            show_progress_bar=show_progress_bar, tokenizer_kwargs=tokenizer_kwargs,
        )  # fmt: skip
        if output_value == "token_embeddings":
            return results[0] if single else results
        embeddings = self._stack(results, truncate_dim=truncate_dim, normalize=normalize_embeddings)
        if single:
            embeddings = embeddings[0]
        if convert_to_tensor:
            return embeddings
        if convert_to_numpy:
            return embeddings.cpu().numpy()
        return embeddings if single else list(embeddings)

    def _check_encode_arguments(self, sentences: list, output_value: str, truncate_dim: int | None):
        for index, sentence in enumerate(sentences):
            check_text(f"sentences[{index}]", sentence)
        if output_value not in _OUTPUT_VALUES:
            raise ValueError(f"output_value={output_value!r} is not one of {', '.join(_OUTPUT_VALUES)}.")
        if truncate_dim is not None and not 0 < truncate_dim <= self.config.hidden_size:
            raise ValueError(f"truncate_dim={truncate_dim} is not in 1 ... {self.config.hidden_size} (hidden_size).")

    def _needed_tokenizer(self):
        if (tokenizer := self.tokenizer) is None:
            raise ValueError("This model was not loaded from a checkpoint: assign a tokenizer to model.tokenizer.")
        return tokenizer

    def _max_length(self, max_length: int | None) -> int:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} is less than one token.")
        special = getattr(self._needed_tokenizer(), "num_special_tokens_to_add", int)()
        if max_length is not None and max_length < special:
            raise ValueError(f"max_length={max_length} is less than the {special} special tokens of a text.")
        # Tokenizers without a stated limit carry a huge placeholder, the published ones 2**31 - 1.
        return max_length or min(self._needed_tokenizer().model_max_length, max(self.config.model_max_length, 1))

    def _tokenize_function(
        self,
        *,
        truncation: bool | str = True,
        max_length: int | None = None,
        padding: bool = True,  # accepted for the official signature; nothing is padded
        **tokenizer_kwargs,
    ) -> Callable[[list[str]], "_Window"]:
        if unknown := sorted(set(tokenizer_kwargs) - set(_TOKENIZER_ARGUMENTS)):
            raise TypeError(f"encode() got {', '.join(unknown)}, which neither it nor the tokenizer takes.")
        tokenizer, max_length = self._needed_tokenizer(), self._max_length(max_length)
        truncation = bool(truncation) and truncation != "do_not_truncate"
        options = {"return_attention_mask": False, "verbose": False, **tokenizer_kwargs}

        def tokenize(sentences: list[str]) -> _Window:
            columns = dict(call_tokenizer(tokenizer, sentences, truncation=False, **options))
            lengths = [len(ids) for ids in columns["input_ids"]]
            long = [i for i, length in enumerate(lengths) if length > max_length] if truncation else []
            cut_tokens = 0
            for index in long:
                shortened = call_tokenizer(
                    tokenizer, sentences[index], truncation=True, max_length=max_length, **options
                )
                cut_tokens += lengths[index] - len(shortened["input_ids"])
                lengths[index] = len(shortened["input_ids"])
                for name in columns:
                    columns[name][index] = shortened[name]
            return _Window(columns, lengths, len(long), cut_tokens)

        return tokenize

    def _encode_texts(
        self,
        sentences: list[str],
        output_value: str,
        *,
        batch_size: int,
        max_tokens: int,
        to_cpu: bool,
        show_progress_bar: bool | None,
        tokenizer_kwargs: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Results in the order of the texts, window after window; says once, or counts, what truncation took.

        With `to_cpu` what is computed leaves the device batch by batch, where a GPU could not hold all of it.
        """
        if show_progress_bar is None:
            show_progress_bar = logger.isEnabledFor(logging.INFO)
        tokenize = self._tokenize_function(**tokenizer_kwargs)
        progress_bar = tqdm(total=len(sentences), unit="text", disable=not show_progress_bar, desc="encode")
        results: list[torch.Tensor] = []
        cut_texts = cut_tokens = 0
        with evaluation_mode(self), progress_bar:
            for window in _one_ahead(tokenize, _windows(sentences)):
                cut_texts, cut_tokens = cut_texts + window.cut_texts, cut_tokens + window.cut_tokens
                results += self._encode_window(
                    window,
                    output_value,
                    to_cpu,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    progress_bar=progress_bar,
                )
        counts = _truncations.get()
        for count in counts:
            count.texts, count.tokens = count.texts + cut_texts, count.tokens + cut_tokens
        if cut_texts and not counts:
            logger.warning(
                "%d of %d texts are longer than max_length=%d tokens and were truncated; %d tokens are not embedded. "
                "Pass a larger max_length, or truncation=False, to embed them whole.",
                cut_texts, len(sentences), self._max_length(tokenizer_kwargs.get("max_length")), cut_tokens,
            )  # fmt: skip
        return results

    def _encode_window(
        self,
        window: "_Window",
        output_value: str,
        to_cpu: bool,
        *,
        batch_size: int,
        max_tokens: int,
        progress_bar: tqdm,
    ) -> list[torch.Tensor]:
        """Results in the order of the texts, which are computed from the longest to the shortest."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(window.lengths)
        for batch in token_budget_batches(window.lengths, batch_size=batch_size, max_tokens=max_tokens):
            found = self._encode_batch(window, batch, output_value, to_cpu)
            for index, result in zip(batch, found, strict=True):
                results[index] = result
            progress_bar.update(len(batch))
        return results

    def _encode_batch(
        self, window: "_Window", batch: list[int], output_value: str, to_cpu: bool
    ) -> list[torch.Tensor]:
        """Results of one batch, which is packed from the start: no padding is ever made."""
        lengths = [window.lengths[index] for index in batch]
        if not min(lengths):  # no token at all, as of an empty text without special tokens
            results = [self._encode_batch(window, [i], output_value, to_cpu)[0] if n else self._nothing(output_value)
                       for i, n in zip(batch, lengths, strict=True)]  # fmt: skip
            return [result.cpu() for result in results] if to_cpu else results
        device = self._input_device
        sequences = Sequences.of_lengths(
            self.slopes, lengths, dtype=self.dtype, device=device, sparse=self.config.sparse_attention
        )
        inputs = {
            name: torch.tensor([token for index in batch for token in window.columns[name][index]], device=device)
            for name in ("input_ids", "token_type_ids")
            if name in window.columns
        }
        hidden_states = self._hidden_states(sequences, **inputs).float()
        if output_value == "token_embeddings":
            return list((hidden_states.cpu() if to_cpu else hidden_states).split(lengths))
        embeddings = torch.stack([x.mean(dim=0) for x in hidden_states.split(lengths)])
        return list(embeddings.cpu() if to_cpu else embeddings)

    def _stack(self, results: list[torch.Tensor], *, truncate_dim: int | None, normalize: bool) -> torch.Tensor:
        """`(texts, hidden or truncate_dim) float32`; a shortened embedding is normalised as what it is."""
        embeddings = torch.stack(results) if results else torch.empty(0, self.config.hidden_size)
        embeddings = embeddings[:, :truncate_dim]
        return torch.nn.functional.normalize(embeddings, p=2, dim=1) if normalize else embeddings

    def _nothing(self, output_value: str) -> torch.Tensor:
        shape = (0, self.config.hidden_size) if output_value == "token_embeddings" else (self.config.hidden_size,)
        return torch.zeros(shape, device=self._input_device)

    @property
    def _input_device(self) -> torch.device:
        """Where the embeddings are computed, also when accelerate brings them there from memory or disk."""
        if self.device.type != "meta":
            return self.device
        modules = (self.embeddings, self.embeddings.word_embeddings)
        places = [getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in modules]
        found = [place for place in places if place is not None]
        return torch.device(found[0]) if found else self.device


@dataclass
class _Window:
    """Tokenised texts: token ids (and token types) unpadded, tokens of each text, and what truncation took."""

    columns: dict[str, list[list[int]]]
    lengths: list[int]
    cut_texts: int
    cut_tokens: int


def _windows(sentences: list[str]) -> Iterator[list[str]]:
    """Texts that are tokenised together: token ids of all of them are in memory, 44 bytes and more a token."""
    start = characters = 0
    for index, sentence in enumerate(sentences):
        full = index - start == (_WINDOW if start else _FIRST_WINDOW)
        if index > start and (full or characters + len(sentence) > _WINDOW_CHARACTERS):
            yield sentences[start:index]
            start, characters = index, 0
        characters += len(sentence)
    if start < len(sentences):
        yield sentences[start:]


_TOKENIZER_ARGUMENTS = (
    "add_special_tokens", "pad_to_multiple_of", "padding_side", "return_attention_mask", "return_special_tokens_mask",
    "return_token_type_ids", "split_special_tokens", "stride", "verbose",
)  # fmt: skip
"""Arguments of a tokenizer's call that leave its output what `encode` reads."""
_tokens: WeakKeyDictionary[torch.nn.Module, str | bool] = WeakKeyDictionary()
"""Access tokens that models were loaded with; never part of a model, which may be pickled."""
_tokenizing = threading.Lock()


def call_tokenizer(tokenizer, texts: str | list[str], **options: Any):
    """A tokenizer's call, one at a time.

    TRAP: a fast tokenizer keeps the truncation of a call as its own state; one thread would have the other's.
    """
    with _tokenizing:
        return tokenizer(texts, **options)


_guard = threading.Lock()
_evaluations: WeakKeyDictionary[torch.nn.Module, tuple[int, list[torch.nn.Module]]] = WeakKeyDictionary()
"""How many calls a model is in evaluation mode for, and its modules that were in training mode before the first."""


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the modules train that did before, also after an error.

    Several threads may use a model at the same time: the last one to finish brings the modes back.
    """
    with _guard:
        calls, training = _evaluations.get(model, (0, []))
        if not calls:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _evaluations[model] = calls + 1, training
    try:
        yield
    finally:
        with _guard:
            calls, training = _evaluations.pop(model)
            if calls > 1:
                _evaluations[model] = calls - 1, training
            else:
                for module in training:
                    module.training = True


def _one_ahead(function: Callable, items: Iterable) -> Iterator:
    """Results of `function` in order, the next one being computed while the caller works on this one."""
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:  # as for a single query: a thread would cost more than it gives
        yield from map(function, first)
        return
    with ThreadPoolExecutor(max_workers=1) as executor:
        pending = deque[Future]()
        for item in itertools.chain(first, items):
            pending.append(executor.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
