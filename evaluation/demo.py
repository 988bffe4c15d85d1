"""`make demo`: embeds a small library with the shipped model, searches it, and draws a map of it.

    python -m evaluation.demo [--model FOLDER] [--library FOLDER] [--output FOLDER] [--query TEXT ...] [--dtype NAME]

Every `NAME.txt` of the library is one document, its first line the title. Each document becomes one vector, however
long (`truncation=False`), and each of its passages another; all have length 1, so a dot product is the cosine.

Law: the model is loaded as any user of the Hub loads it, through `AutoModel` with trust_remote_code; the package
modeling_jina_bert is not imported. COST: two passes over the library, in time quadratic in the length of a document at
worst; the shipped library has about 71,000 tokens.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .demo_map import draw_map

REPOSITORY = Path(__file__).parent.parent
LONG_TOKENS = 8192  # the declared maximum of the released models; longer documents are marked
PASSAGE_WORDS = 120
SNIPPET_WORDS = 45
TOP = 3

QUERIES = (
    "Why must women in Flatland keep making a sound in public?",
    "Why is the door of the tea room so low?",
    "What was left in Pandora's jar after the plagues had escaped?",
    "What happened to the king who wished that everything he touched would turn into gold?",
    "Which symbol should Python use for matrix multiplication?",
    "What does the treaty allow Antarctica to be used for?",
    "How did the phosphate mines make a small Pacific island rich?",
    "Could machines become conscious and replace mankind?",
)

_SENTENCE_END = r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d\u2019)])\s+"
_SEPARATORS = (r"\n\s*\n", _SENTENCE_END, r"\n", r"\s+")  # where a text is cut, coarsest first


class DemoError(Exception):
    """Bad input, told to the user in one line."""


@dataclass(frozen=True)
class Document:
    """A text of the library. A file `KIND-NAME.txt` tells its kind; other files are of kind "text"."""

    name: str
    text: str

    @property
    def title(self) -> str:
        return self.text.split("\n", 1)[0].strip()

    @property
    def kind(self) -> str:
        return self.name.split("-", 1)[0] if "-" in self.name else "text"

    @property
    def label(self) -> str:
        return self.name.split("-", 1)[-1].replace("-", " ")

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class Passage:
    """Words `start` to `start + words` (from 0, end excluded) of document number `document`."""

    document: int
    start: int
    text: str

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class Library:
    """The documents, their passages, and one vector of length 1 for each; times in seconds.

    `document_vectors` is `(documents, hidden) float32`, `passage_vectors` `(passages, hidden) float32`.
    """

    documents: list[Document]
    passages: list[Passage]
    document_vectors: np.ndarray
    passage_vectors: np.ndarray
    document_tokens: list[int]
    document_seconds: list[float]
    passage_tokens: int
    passage_seconds: float


def read_library(folder: Path) -> list[Document]:
    """The `.txt` files of the folder by name.

    Raises:
        DemoError: No such folder, or no text in it.
    """
    if not folder.is_dir():
        raise DemoError(f"no library folder at {folder}: pass --library FOLDER with .txt files")
    documents = []
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"cannot read {path} as UTF-8 text: {error}") from None
        if text:
            documents.append(Document(path.stem, text))
    if not documents:
        raise DemoError(f"the library {folder} is empty: put .txt files there, first line = title")
    return documents


def _pieces(text: str, words: int, level: int = 0) -> list[str]:
    """Cuts a text at the coarsest separators that give pieces of at most `words` words; only whitespace is lost."""
    if len(text.split()) <= words:
        return [text]
    parts = re.split(_SEPARATORS[level], text)
    return [piece for part in parts for piece in _pieces(part, words, level + 1)]


def split_passages(text: str, *, document: int = 0, words: int = PASSAGE_WORDS) -> list[Passage]:
    """Passages of about `words` words that end with a paragraph, or else a sentence, where possible.

    Every word of the text is in exactly one passage. A passage has at most 1.25 * `words` words: no crumb of
    a quarter of `words` or less, such as a heading, stays alone.

    Example:
        >>> [(p.start, p.text) for p in split_passages("One two.\\n\\nThree four five. Six seven.", words=3)]
        [(0, 'One two.'), (2, 'Three four five.'), (5, 'Six seven.')]
    """
    crumb = words // 4
    groups: list[list[str]] = [[]]
    for piece in _pieces(text, words):
        piece_words = piece.split()
        if len(groups[-1]) > crumb and len(groups[-1]) + len(piece_words) > words:
            groups.append([])
        groups[-1] += piece_words
    if len(groups) > 1 and len(groups[-1]) <= crumb and len(groups[-2]) <= words:
        last = groups.pop()
        groups[-1] += last
    passages, start = [], 0
    for group in groups:
        if group:
            passages.append(Passage(document, start, " ".join(group)))
            start += len(group)
    return passages


def multiplies_bf16() -> bool:
    """Whether this processor has products of bfloat16 (AVX512-BF16 or AMX), which are faster than those of float32."""
    features = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in features)


def load_model(name: str, dtype: torch.dtype = torch.float32):
    """The model as a user of the Hub loads it, on the GPU if there is one.

    Raises:
        DemoError: `name` is neither a folder with a model nor a repository within reach.
    """
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=dtype)
        # NOTE: given here because without trust_remote_code transformers would stop and ask at the terminal.
        model.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        where = name if Path(name).is_dir() else f"{name} (no such folder here, no such repository within reach)"
        raise DemoError(f"no model to load at {where}: {reason}") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def embed_library(model, documents: Sequence[Document], *, progress=iter) -> Library:
    """Every document as one vector, whole, and every passage as one, with the tokens and seconds of each.

    Args:
        model: Has `encode` and `tokenizer`.
        documents: At least one.
        progress: Wraps the iteration over the documents, to show how far it is.
    """

    def count(text: str) -> int:
        return len(model.tokenizer(text, verbose=False)["input_ids"])

    vectors, seconds = [], []
    for document in progress(documents):
        began = time.perf_counter()
        vectors.append(model.encode(document.text, truncation=False, normalize_embeddings=True))
        seconds.append(time.perf_counter() - began)
    passages = [p for i, document in enumerate(documents) for p in split_passages(document.text, document=i)]
    texts = [passage.text for passage in passages]
    began = time.perf_counter()
    passage_vectors = model.encode(texts, normalize_embeddings=True)
    passage_seconds = time.perf_counter() - began
    return Library(
        documents=list(documents),
        passages=passages,
        document_vectors=np.stack(vectors),
        passage_vectors=passage_vectors,
        document_tokens=[count(document.text) for document in documents],
        document_seconds=seconds,
        passage_tokens=sum(map(count, texts)),
        passage_seconds=passage_seconds,
    )


def rank(query: np.ndarray, vectors: np.ndarray, *, top: int = TOP) -> list[tuple[int, float]]:
    """Indices and cosines of the `top` nearest vectors, best first; ties keep their order.

    Args:
        query: `(hidden,) float`, of length 1.
        vectors: `(rows, hidden) float`, each of length 1.
        top: Rows to return at most.

    Example:
        >>> rank(np.array([1.0, 0.0]), np.array([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), top=2)
        [(1, 1.0), (2, 0.6)]
    """
    scores = vectors @ query
    return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]


def snippet(model, query: np.ndarray, text: str, *, words: int = SNIPPET_WORDS) -> str:
    """The part of a passage that begins with the sentence nearest to the query."""
    sentences = [sentence for sentence in re.split(_SENTENCE_END, text) if sentence]
    best = rank(query, model.encode(sentences, normalize_embeddings=True), top=1)[0][0]
    rest = " ".join(sentences[best:]).split()
    return ("… " if best else "") + " ".join(rest[:words]) + (" …" if len(rest) > words else "")


def print_answer(console, model, library: Library, query: str):
    """Ranks the documents, then the passages of all documents, and prints both."""
    from rich.markup import escape
    from rich.table import Table

    vector = model.encode(query, normalize_embeddings=True)
    console.print(f"\n[bold]{escape(query)}[/bold]")
    nearest = [
        f"{place}. {escape(library.documents[index].title)} [dim]({score:.3f})[/dim]"
        for place, (index, score) in enumerate(rank(vector, library.document_vectors), start=1)
    ]
    console.print("Documents: " + "\n           ".join(nearest))
    table = Table(show_lines=True)
    table.add_column("", justify="right")
    table.add_column("Score", justify="right")
    table.add_column("Passage from", max_width=32)
    table.add_column("Text", ratio=1)
    for place, (index, score) in enumerate(rank(vector, library.passage_vectors), start=1):
        passage = library.passages[index]
        document = library.documents[passage.document]
        position = f"word {passage.start + 1:,} of {document.words:,}"
        where = f"{escape(document.title)}\n[cyan]{position}[/cyan]"
        table.add_row(str(place), f"{score:.3f}", where, escape(snippet(model, vector, passage.text)))
    console.print(table)


def print_library(console, library: Library):
    """The documents with their tokens, and what was measured."""
    from rich.markup import escape
    from rich.table import Table

    title = f"The library: one vector a document, however long; * = over {LONG_TOKENS:,} tokens"
    table = Table(title=title, show_footer=True)
    total = sum(library.document_tokens)
    seconds = sum(library.document_seconds)
    table.add_column("Document", "All documents, whole\nTheir passages")
    table.add_column("Words", f"{sum(d.words for d in library.documents):,}", justify="right")
    table.add_column("Tokens", f"{total:,}  \n{library.passage_tokens:,}  ", justify="right")
    table.add_column("Passages", f"\n{len(library.passages):,}", justify="right")
    table.add_column("Seconds", f"{seconds:.2f}\n{library.passage_seconds:.2f}", justify="right")
    rates = total / seconds, library.passage_tokens / library.passage_seconds
    table.add_column("Tokens/s", f"{rates[0]:,.0f}\n{rates[1]:,.0f}", justify="right")
    for index in sorted(range(len(library.documents)), key=lambda i: -library.document_tokens[i]):
        tokens, took = library.document_tokens[index], library.document_seconds[index]
        document = library.documents[index]
        passages = sum(passage.document == index for passage in library.passages)
        mark = "[bold yellow] *[/bold yellow]" if tokens > LONG_TOKENS else "  "
        numbers = f"{document.words:,}", f"{tokens:,}{mark}", str(passages), f"{took:.2f}", f"{tokens / took:,.0f}"
        table.add_row(escape(document.title), *numbers)
    console.print()
    console.print(table)


def draw_library_map(library: Library, path: Path):
    """Writes the map of the documents and their passages as a PNG."""
    kinds = [document.kind for document in library.documents]
    draw_map(
        path,
        labels=[document.label for document in library.documents],
        kinds=kinds,
        vectors=library.document_vectors,
        passage_kinds=[kinds[passage.document] for passage in library.passages],
        passage_vectors=library.passage_vectors,
    )


def run(options: argparse.Namespace):
    """The demo, from the model to the map."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    queries = QUERIES if options.query is None else options.query
    if not all(query.strip() for query in queries):
        raise DemoError("an empty --query cannot be answered")
    documents = read_library(options.library)
    began = time.perf_counter()
    model = load_model(options.model, getattr(torch, options.dtype))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    took = time.perf_counter() - began
    console.print(
        f"Model: {options.model}, {parameters / 1e6:.1f} M parameters, {options.dtype}, loaded in {took:.1f} s"
    )
    if options.dtype == "float32" and model.device.type == "cpu" and multiplies_bf16():
        console.print(
            "This processor multiplies bfloat16: --dtype bfloat16, in your code from_pretrained(..., "
            "dtype=torch.bfloat16), is faster in half the memory."
        )

    def progress(items):
        return track(items, f"Embedding {len(items)} documents", console=console, transient=True)

    library = embed_library(model, documents, progress=progress if console.is_terminal else iter)
    console.print(
        f"Library: {len(documents)} documents, {len(library.passages)} passages of about {PASSAGE_WORDS} words"
    )
    for query in queries:
        print_answer(console, model, library, query)
    print_library(console, library)
    path = options.output / "map.png"
    try:
        draw_library_map(library, path)
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or error}") from None
    console.print(f"\nMap: {path}    Total: {time.perf_counter() - began:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.demo", description="Embed, search and map a library.")
    parser.add_argument(
        "--model", default=str(REPOSITORY / "hub_repo" / "tiny"), help="model folder or Hub repository"
    )
    parser.add_argument("--library", type=Path, default=Path(__file__).parent / "demo_library", help="folder of .txt")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for map.png")
    parser.add_argument("--query", nargs="+", metavar="TEXT", help="your own questions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32, exact")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"demo: {error.name} is missing: pip install -e '.[demo]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
