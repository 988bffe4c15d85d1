"""The map of the demo: documents and their passages in the plane, near each other where the model sees them near.

Law: the same vectors give the same picture, however fast the machine is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LABEL_STEPS = 500
"""Moves of the labels at most; the search for their places ends as soon as no two overlap."""
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6A3D9A",
    "#444444",
)  # colour-blind safe


def project(vectors: np.ndarray) -> np.ndarray:
    """t-SNE of the vectors by cosine, seeded.

    Args:
        vectors: `(rows, hidden) float`.

    Returns:
        `(rows, 2) float32`; all zero for a single row.
    """
    from sklearn.manifold import TSNE

    rows = len(vectors)
    if rows < 2:
        return np.zeros((rows, 2), dtype=np.float32)
    perplexity = max(1.0, min(30.0, (rows - 1) / 3))
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(vectors)


def draw_map(
    path: Path,
    *,
    labels: Sequence[str],
    kinds: Sequence[str],
    vectors: np.ndarray,
    passage_kinds: Sequence[str],
    passage_vectors: np.ndarray,
):
    """Writes a PNG: a dot for each passage, a large one with its label for each document, coloured by kind.

    Args:
        path: Of the PNG; its folder is made.
        labels: One a document.
        kinds: One a document.
        vectors: `(documents, hidden) float`.
        passage_kinds: One a passage, the kind of its document.
        passage_vectors: `(passages, hidden) float`.

    Raises:
        OSError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = project(np.concatenate([vectors, passage_vectors]))
    document_points, passage_points = points[: len(vectors)], points[len(vectors) :]
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(sorted(set(kinds)))}
    figure, axes = pyplot.subplots(figsize=(13, 9), dpi=120)
    draw_dots(
        axes, colours, points=document_points, kinds=kinds, passage_points=passage_points, passage_kinds=passage_kinds
    )
    axes.set_title(
        "The library as the model sees it: small dot = passage, large dot = whole document (t-SNE of the vectors)"
    )
    figure.tight_layout()
    draw_labels(axes, document_points, labels=labels, colours=[colours[kind] for kind in kinds])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def draw_dots(
    axes: Any,
    colours: dict[str, str],
    *,
    points: np.ndarray,
    kinds: Sequence[str],
    passage_points: np.ndarray,
    passage_kinds: Sequence[str],
):
    """The dots, and beside them the legend of their colours.

    Args:
        axes: Of matplotlib.
        colours: Kind -> colour, in the order of the legend.
        points: `(documents, 2) float`.
        kinds: One a document.
        passage_points: `(passages, 2) float`.
        passage_kinds: One a passage.
    """
    for kind, colour in colours.items():
        own = passage_points[np.array(passage_kinds) == kind]
        axes.scatter(own[:, 0], own[:, 1], s=20, alpha=0.5, linewidths=0, color=colour, label=kind)
    big = {"s": 130, "c": [colours[kind] for kind in kinds], "edgecolors": "white"}
    axes.scatter(points[:, 0], points[:, 1], linewidths=1.5, zorder=4, **big)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.06)
    legend = axes.legend(
        title="Kind of text", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=2
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def draw_labels(axes: Any, points: np.ndarray, *, labels: Sequence[str], colours: Sequence[str]) -> list[Any]:
    """Names the documents beside their dots, with a line from name to dot.

    Args:
        axes: Of matplotlib, with everything else drawn: its limits stay.
        points: `(documents, 2) float`.
        labels: One a document.
        colours: One a document.

    Returns:
        The texts of matplotlib, where they have come to stand.
    """
    from adjustText import adjust_text

    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "alpha": 0.9}
    texts = [
        axes.text(*point, label, zorder=5, bbox={**box, "ec": colour})
        for point, label, colour in zip(points, labels, colours, strict=True)
    ]
    adjust_text(
        texts,
        points[:, 0],
        points[:, 1],
        ax=axes,
        expand=(1.3, 1.8),
        iter_lim=LABEL_STEPS,
        arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.8},
    )
    return texts
