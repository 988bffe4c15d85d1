"""Clustering as the clustering tasks of MTEB (arXiv 2210.07316) do it: mini-batch k-means of the vectors.

Law: one clustering for each seed, all over the same vectors, with as many clusters as there are labels.
"""

from collections.abc import Iterable

import numpy as np

try:
    from sklearn.cluster import MiniBatchKMeans
except ImportError as error:
    raise ImportError("evaluation.clustering needs: pip install -e '.[evaluate]'") from error

BATCH = 500  # texts, as in mteb


def clusterings(vectors: np.ndarray, clusters: int, seeds: Iterable[int]) -> np.ndarray:
    """The cluster of each text, once for each seed.

    Args:
        vectors: `(texts, hidden) float32`.
        clusters: How many.
        seeds: Of the first centres and the batches.

    Returns:
        `(seeds, texts) uint16`.
    """
    found = []
    for seed in seeds:
        model = MiniBatchKMeans(n_clusters=clusters, batch_size=BATCH, n_init="auto", random_state=seed)
        found.append(model.fit(vectors).labels_)
    return np.stack(found).astype(np.uint16)
