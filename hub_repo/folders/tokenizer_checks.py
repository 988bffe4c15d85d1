"""Whether the tokenizer of a folder can split texts for its model, by its files alone.

Law: a folder without a vocabulary is named. transformers makes a tokenizer of nothing but special tokens of it, with
which all texts are [UNK], and no error.
"""

from pathlib import Path

from tokenizers import Tokenizer

from modeling_jina_bert import JinaBertConfig

from .checkpoint_files import FolderError
from .findings import Finding

TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.txt"


def tokenizer_findings(folder: Path, config: JinaBertConfig | None) -> list[Finding]:
    """What is wrong with tokenizer.json, which a folder of our form has.

    Args:
        folder: A model folder.
        config: For the rows of the word embedding; None if it cannot be read.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return [Finding("error", TOKENIZER, "is missing: the folder cannot embed texts")]
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        return [Finding("error", TOKENIZER, f"cannot be read: {' '.join(str(error).split())}")]
    findings = []
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if set(vocabulary) <= special:
        findings.append(Finding("error", TOKENIZER, "has no vocabulary beyond special tokens"))
    largest = max(vocabulary.values(), default=0)
    if config is not None and largest >= config.vocab_size:
        findings.append(Finding("error", TOKENIZER, f"has token {largest}, the embedding {config.vocab_size} rows"))
    if tokenizer.truncation or tokenizer.padding:
        findings.append(Finding("warning", TOKENIZER, "has truncation or padding of its own baked in"))
    if not (folder / "tokenizer_config.json").is_file():
        findings.append(
            Finding("warning", "tokenizer_config.json", "is missing: no special tokens, no maximum length")
        )
    return findings


def refuse_missing_tokenizer(folder: Path):
    """Refuses a folder, or its outline, without the files of a tokenizer.

    Raises:
        FolderError: There is neither tokenizer.json nor vocab.txt.
    """
    if not (folder / TOKENIZER).is_file() and not (folder / VOCABULARY).is_file():
        raise FolderError(f"{folder} has no tokenizer: neither {TOKENIZER} nor {VOCABULARY}.")


def refuse_bad_tokenizer(folder: Path, config: JinaBertConfig):
    """Refuses a folder of either form whose texts could not be embedded; vocab.txt alone is enough.

    Raises:
        FolderError: There is no tokenizer, or one that cannot be read or does not fit the model.
    """
    refuse_missing_tokenizer(folder)
    if (folder / TOKENIZER).is_file():
        for finding in tokenizer_findings(folder, config):
            if finding.severity == "error":
                raise FolderError(f"{folder / finding.file} {finding.message}.")
