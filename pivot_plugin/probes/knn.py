"""The k-nearest-neighbour probe: which class have the images whose features lie nearest? Nothing is trained.

Protocol: Caron et al. 2021 (DINO), section 4 and their published code: cosine similarity, k neighbours, each voting
with exp(similarity / 0.07).
"""

from typing import Any

import numpy as np

from pivot_plugin.errors import SettingsError
from pivot_plugin.extras import require

from . import subjects
from .data import labelled_images
from .extraction import features
from .linear import normalised, top_k
from .scores import ProbeResult, Score, score_of

# Caron et al. 2021
NEIGHBOURS, TEMPERATURE = 20, 0.07


def knn_probe(
    examined: object,
    data: object,
    *,
    k: int | None = None,
    temperature: float = TEMPERATURE,
    projected: bool = False,
    seed: int = 0,
    **extraction: Any,
) -> ProbeResult:
    """Give each image the class that its nearest neighbours among others vote for.

    Args:
        examined: as for `features`.
        data: as for `labelled_images`.
        k: neighbours that vote; 20 where None, or as many as there are images of a class to fit on (on average), if
            these are fewer.
        temperature: of their weights; the smaller, the more the nearest decide.
        projected: measure encoder and projector together instead of the encoder.
        seed: of the splits and intervals.
        **extraction: options of `features`.

    Returns:
        "balanced", the mean over classes of the share of their images that are told, of which chance is one in so many
        classes however many images each has (`settings["chance"]`), and "top1", the share of all images.

    Raises:
        DataError: for data that cannot be used.
        SettingsError: for a k or temperature that cannot be, or if scikit-learn is not installed.

    Source: Caron et al. 2021; balanced accuracy as scikit-learn defines it.
    """
    neighbors = require("sklearn.neighbors", "probes", "The knn probe")
    subject = subjects.subject(examined)
    fitting, scoring = labelled_images(data, seed=seed)
    if k is None:
        k = max(1, min(NEIGHBOURS, len(fitting.labels) // len(np.unique(fitting.labels))))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(fitting.labels):
        raise SettingsError(f"k is {k!r}, for {len(fitting.labels)} images to fit on.", "Give 1 or more, no more.")
    if not temperature > 0:
        raise SettingsError(f"temperature is {temperature}.", "Give a number above 0.")
    vectors, others = (
        normalised(features(subject, part.images, pool="mean", projected=projected, **extraction).pooled())
        for part in (fitting, scoring)
    )
    voting = neighbors.KNeighborsClassifier(
        k,
        # relative to the nearest, which changes no share of the votes and overflows nowhere
        weights=lambda distances: np.exp((distances.min(axis=1, keepdims=True) - distances) / temperature),
        metric="cosine",
        algorithm="brute",
    ).fit(vectors, fitting.labels)
    votes = np.zeros((len(others), int(fitting.labels.max()) + 1))
    votes[:, voting.classes_] = voting.predict_proba(others)
    right = top_k(votes, scoring.labels, 1)
    classes = len(np.unique(scoring.labels))
    settings = {
        "k": k,
        "temperature": temperature,
        "fitted_on": len(vectors),
        "scored_on": len(others),
        "classes": classes,
        "chance": 1 / classes,
        "features": "encoder+projector" if projected else "encoder",
        "seed": seed,
    }
    return ProbeResult(
        "knn", {"balanced": _balanced(right, scoring.labels, seed), "top1": score_of(right, seed)}, settings
    )


def _balanced(right: np.ndarray, labels: np.ndarray, seed: int) -> Score:
    """The mean over classes of their images' mean."""
    present, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() == counts.max():
        # of equally many images of each class it is the mean of all, which can be paired right by wrong
        return score_of(right, seed)
    samples = np.zeros((len(labels), len(present), 2))
    rows = np.arange(len(labels))
    samples[rows, number, 0], samples[rows, number, 1] = right, 1.0
    return score_of(samples, seed)
