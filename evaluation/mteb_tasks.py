"""Which tasks `evaluation.mteb_run` runs: mteb's, the five of LoCo that mteb has not, and local sets as mteb tasks.

Laws: every name is checked before any data are loaded, and an unknown one is an `EvaluationError` of one line. A task
of the paper's benchmark has the paper's splits and languages, any other its English part. A local set's revision is a
hash of its texts, so that a changed set is scored anew.

Source of the published scores: arXiv 2310.19923, tables of MTEB, of longer inputs and of LoCo. Scores in percent.
"""

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .sets import EvaluationError, RetrievalSet, TextSet, load_set

try:
    import mteb
    import mteb.tasks
    from datasets import Dataset, DatasetDict, load_dataset
    from huggingface_hub import HfApi
    from mteb.abstasks import AbsTask, AbsTaskClustering, AbsTaskRetrieval
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
    from mteb.abstasks.task_metadata import TaskMetadata
except ImportError as error:
    raise ImportError("evaluation.mteb_tasks needs: pip install -e '.[evaluate,mteb]'") from error

PAPER = "MTEB(eng, v1)"
LONG = ("NarrativeQARetrieval", "WikiCitiesClustering", "SciFact", "BigPatentClustering")
"""What the paper scores at 128, 512 and 8191 tokens."""

CATEGORIES = {
    "Classification": "CF",
    "Clustering": "CL",
    "PairClassification": "PC",
    "Reranking": "RR",
    "Retrieval": "RT",
    "STS": "STS",
    "Summarization": "SM",
}
"""mteb's type -> the paper's column."""

PUBLISHED: dict[str, dict[str, float]] = {
    "jina-embeddings-v2-base-en": {
        **{"CF": 73.45, "CL": 41.73, "PC": 85.38, "RR": 56.98, "RT": 47.87, "STS": 80.70, "SM": 31.60},
        "average": 60.38,
    },
    "jina-embeddings-v2-small-en": {
        **{"CF": 68.82, "CL": 40.08, "PC": 84.44, "RR": 55.09, "RT": 45.14, "STS": 80.00, "SM": 30.56},
        "average": 58.00,
    },
    "all-MiniLM-L6-v2": {
        **{"CF": 63.05, "CL": 42.35, "PC": 82.37, "RR": 58.04, "RT": 41.95, "STS": 78.90, "SM": 30.81},
        "average": 56.26,
    },
    "text-embedding-ada-002": {
        **{"CF": 70.93, "CL": 45.90, "PC": 84.89, "RR": 56.32, "RT": 49.25, "STS": 80.97, "SM": 30.80},
        "average": 60.99,
    },
}
"""The paper's table of MTEB. The columns of small are the means of the 56 scores in its model card (base's card and
the paper agree), those of all-MiniLM-L6-v2 and ada-002 are from the MTEB table in the cards of thenlper/gte-*."""

PUBLISHED_LENGTHS: dict[str, dict[int, float]] = {
    "NarrativeQARetrieval": {128: 19.6, 512: 21.3, 8191: 39.4},
    "WikiCitiesClustering": {128: 79.9, 512: 79.3, 8191: 75.7},
    "SciFact": {128: 62.1, 512: 66.7, 8191: 69.4},
    "BigPatentClustering": {128: 14.4, 512: 21.9, 8191: 23.1},
    "LoCoSummScreenFDRetrieval": {2048: 87.2, 8192: 93.3},
    "LoCoGovReportRetrieval": {2048: 97.7, 8192: 98.6},
    "LoCoQMSumRetrieval": {2048: 35.1, 8192: 40.8},
    "LoCoQasperTitleRetrieval": {2048: 95.3, 8192: 95.1},
    "LoCoQasperAbstractRetrieval": {2048: 99.7, 8192: 99.3},
}
"""jina-embeddings-v2-base-en: task -> {tokens of the input: main score}."""

_ENGLISH = "eng"


class _LoCoRetrieval(AbsTaskRetrieval):
    """A task of LoCo: the documents of one source, and queries that each have their answer there.

    NOTE: the data are those of LoCoV1 on the Hub, which hold the five sources of the paper among twelve; the paper
    used the first release, so that its scores are near, not the same.
    """

    DOCUMENTS, QUERIES = "hazyresearch/LoCoV1-Documents", "hazyresearch/LoCoV1-Queries"
    source: str

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Loads both data sets by their names on the Hub, at the commits that they have now.

        Raises:
            EvaluationError: They have other columns, or nothing of this source.
        """
        if self.data_loaded:
            return
        documents, revision = self._rows(self.DOCUMENTS, {"pid", "passage"})
        queries, of_queries = self._rows(self.QUERIES, {"qid", "query", "answer_pids"})
        corpus = {row["pid"]: row["passage"] for row in documents if row["passage"]}
        judged = {row["qid"]: {pid: 1 for pid in row["answer_pids"] if pid in corpus} for row in queries}
        if not corpus or not any(judged.values()):
            raise EvaluationError(f"{self.DOCUMENTS}: nothing of the source {self.source!r}.")
        self.corpus = {"test": corpus}
        self.relevant_docs = {"test": {query: answers for query, answers in judged.items() if answers}}
        self.queries = {"test": {row["qid"]: row["query"] for row in queries if judged[row["qid"]]}}
        self.metadata = self.metadata.model_copy(
            update={"dataset": {"path": self.DOCUMENTS, "revision": f"{revision}+{of_queries}"}}
        )
        self.convert_v1_dataset_format_to_v2(num_proc=num_proc)
        self.data_loaded = True

    def _rows(self, name: str, columns: set[str]) -> tuple[Dataset, str]:
        """The rows of the source, and the commit that they are of."""
        revision = HfApi().dataset_info(name).sha
        rows = load_dataset(name, split="test", revision=revision)
        missing = (columns | {"dataset"}) - set(rows.column_names)
        if missing:
            raise EvaluationError(f"{name}: no column {sorted(missing)[0]!r}; it has {', '.join(rows.column_names)}.")
        return rows.filter(lambda source: source == self.source, input_columns="dataset"), str(revision)


def _task_class(
    base: type, name: str, *, path: str, revision: str, kind: str, description: str, **attributes: Any
) -> type:
    """A task of mteb: its metadata, and the class that has them."""
    metadata = TaskMetadata(
        name=name,
        description=description,
        dataset={"path": path, "revision": revision},
        type=kind,
        category="t2t" if kind == "Retrieval" else "t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10" if kind == "Retrieval" else "v_measure",
    )
    return type(name, (base,), {"metadata": metadata, **attributes})


def _loco(name: str, source: str, description: str) -> type:
    description = f"LoCo: {description}"
    return _task_class(
        _LoCoRetrieval, name, path=_LoCoRetrieval.DOCUMENTS, revision="main", kind="Retrieval",
        description=description, source=source,
    )  # fmt: skip


LOCO: dict[str, type[AbsTaskRetrieval]] = {
    task.metadata.name: task
    for task in (
        _loco("LoCoSummScreenFDRetrieval", "summ_screen_fd", "transcripts of television by their summaries."),
        _loco("LoCoGovReportRetrieval", "gov_report", "government reports by their summaries."),
        _loco("LoCoQMSumRetrieval", "qmsum", "meetings by questions about them."),
        _loco("LoCoQasperTitleRetrieval", "qasper_title", "papers by their titles."),
        _loco("LoCoQasperAbstractRetrieval", "qasper_abstract", "papers by their abstracts."),
    )
}

GROUPS = ("paper", "long", "loco")
"""Names for `PAPER`, `LONG` and `LOCO`."""


def local_task(data: Path, name: str) -> AbsTask:
    """A local set as a task of mteb.

    Args:
        data: Folder that has eval/.
        name: A retrieval or clustering set of `load_set`.

    Returns:
        The task with its data loaded; "/" in its name is "-".

    Raises:
        EvaluationError: There is no such set, or it is malformed.
    """
    dataset = load_set(data, name)
    if not isinstance(dataset, RetrievalSet | TextSet):
        raise EvaluationError(f"{name}: is no retrieval or clustering set.")
    clustering = isinstance(dataset, TextSet)
    task = _task_class(
        AbsTaskClustering if clustering else AbsTaskRetrieval,
        name.replace("/", "-"),
        path=f"local/{name}",
        revision=dataset.sha256[:40],
        kind="Clustering" if clustering else "Retrieval",
        description=f"The local set {name}.",
    )()
    if isinstance(dataset, TextSet):
        task.max_fraction_of_documents_to_embed = None
        task.max_documents_per_cluster = min(len(dataset.texts), AbsTaskClustering.max_documents_per_cluster)
        columns = {"sentences": dataset.texts, "labels": dataset.labels}
        task.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
    else:
        task.corpus, task.queries = {"test": dataset.documents}, {"test": dataset.queries}
        task.relevant_docs = {"test": dataset.qrels}
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    task.data_loaded = True
    return task


@lru_cache
def paper_tasks() -> dict[str, AbsTask]:
    """The paper's 56 tasks, with its splits and languages."""
    return {task.metadata.name: task for task in mteb.get_benchmark(PAPER).tasks}


@lru_cache
def mteb_names() -> frozenset[str]:
    """Names of all tasks of mteb, superseded ones included (the paper's BigPatentClustering is one)."""
    classes = (each for each in vars(mteb.tasks).values() if isinstance(each, type) and issubclass(each, AbsTask))
    return frozenset(each.metadata.name for each in classes if hasattr(each, "metadata"))


def select_tasks(names: Iterable[str], data: Path | None = None) -> list[AbsTask]:
    """Tasks by name, none twice.

    Args:
        names: Tasks or benchmarks of mteb, LoCo's tasks, a name of `GROUPS`, or local sets ("long/NAME").
        data: Where local sets are, the folder that has eval/.

    Raises:
        EvaluationError: An unknown name; a local set without `data`.
    """
    selected: dict[str, AbsTask] = {}
    for name in names:
        for task in _named(name, data):
            selected.setdefault(task.metadata.name, task)
    return list(selected.values())


def _named(name: str, data: Path | None) -> Sequence[AbsTask]:
    if name in ("paper", PAPER):
        return list(paper_tasks().values())
    if name in ("long", "loco"):
        return [task for member in (LONG if name == "long" else LOCO) for task in _named(member, data)]
    if name in LOCO:
        return [LOCO[name]()]
    if name in paper_tasks():
        return [paper_tasks()[name]]
    if name.split("/")[0] in ("ir", "long", "clustering"):
        if data is None:
            raise EvaluationError(f"--tasks {name}: is a local set, say with --data where the sets are.")
        return [local_task(data, name)]
    known = mteb_names()
    if name in known:
        task = mteb.get_task(name)
        return [task.filter_languages([_ENGLISH]) if _ENGLISH in task.languages else task]
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    close = difflib.get_close_matches(name, [*known, *LOCO, *GROUPS], n=3, cutoff=0.5)
    raise EvaluationError(
        f"--tasks {name}: is no task or benchmark of mteb {mteb.__version__}, and none of {', '.join(GROUPS)}"
        + (f"; near it are {', '.join(close)}." if close else ".")
    )


def load_task(task: AbsTask):
    """Loads the data of a task.

    Raises:
        EvaluationError: They cannot be had: no network, no such revision, no access.
    """
    try:
        task.load_data()
    except EvaluationError:
        raise
    except Exception as error:  # datasets, huggingface_hub and requests have no common class of errors
        reason = " ".join(str(error).split())[:300]
        path = task.metadata.dataset["path"]
        raise EvaluationError(f"{task.metadata.name}: {path} cannot be loaded ({reason}).") from error


def sets_of(task: AbsTask) -> list[RetrievalSet | TextSet]:
    """The data of a retrieval or clustering task: a set for each subset, split and row that is scored by itself.

    Returns:
        The sets; what is more than one is in their names: TASK, TASK:SPLIT, TASK:SUBSET:SPLIT, TASK:ROW.

    Raises:
        EvaluationError: They cannot be loaded; a task of another kind.
    """
    if not isinstance(task, AbsTaskRetrieval | AbsTaskClusteringLegacy | AbsTaskClustering):
        raise EvaluationError(f"{task.metadata.name}: is no retrieval or clustering task.")
    load_task(task)
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    # As mteb: a task of one subset may hold its splits at once.
    subsets = {subset: task.dataset.get(subset, task.dataset) for subset in task.hf_subsets}
    places = [(subset, split) for subset, splits in subsets.items() for split in task.eval_splits if split in splits]
    sets: list[RetrievalSet | TextSet] = []
    for subset, split in places:
        parts = [task.metadata.name, *[subset] * (len(subsets) > 1)]
        name = ":".join([*parts, *[split] * (len({split for _, split in places}) > 1)])
        rows = subsets[subset][split]
        sets += [_retrieval_set(name, rows)] if isinstance(task, AbsTaskRetrieval) else _text_sets(task, name, rows)
    return sets


def _text_sets(task: Any, name: str, rows: Any) -> list[TextSet]:
    """A row is a text; of mteb's older clustering tasks a list of texts, clustered by itself."""
    texts, labels = rows[task.input_column_name], rows[task.label_column_name]
    if isinstance(texts[0], str):
        texts, labels = [texts], [labels]
    names = [name] if len(texts) == 1 else [f"{name}:{row}" for row in range(len(texts))]
    return [
        TextSet(of_row, "clustering", list(t), [str(label) for label in y])
        for of_row, t, y in zip(names, texts, labels, strict=True)
    ]


def _retrieval_set(name: str, split: Any) -> RetrievalSet:
    documents = {
        row["id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in split["corpus"]
    }
    texts = {row["id"]: row["text"] for row in split["queries"]}
    judged = {
        query: {document: int(grade) for document, grade in found.items() if document in documents}
        for query, found in split["relevant_docs"].items()
        if query in texts
    }
    judged = {query: found for query, found in judged.items() if any(grade > 0 for grade in found.values())}
    return RetrievalSet(name, {query: texts[query] for query in judged}, documents, judged)
