"""The linear probe: how well does one linear layer on frozen features tell the classes of images?

Protocol: arXiv 2510.16333, appendix E.3 and C.3, but for the choice of the regularisation, which is made on a
validation split of the images to fit on, never on those that are scored.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pivot_plugin.errors import SettingsError
from pivot_plugin.extras import require

from .data import Labelled, check_share, labelled_images, stratified
from .extraction import features
from .scores import ProbeResult, score_of
from .subjects import subject

# arXiv 2510.16333, appendix E.3
PAPER_C = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)
MAX_ITERATIONS = 1000
TOP = 5


def linear_probe(
    examined: object,
    data: object,
    *,
    method: Literal["logistic", "prototype"] = "logistic",
    regularisation: Sequence[float] = PAPER_C,
    validation_share: float = 0.2,
    projected: bool = False,
    seed: int = 0,
    **extraction: Any,
) -> ProbeResult:
    """Fit a linear classifier on the mean patch features of images, and score it on others.

    Args:
        examined: as for `features`.
        data: as for `labelled_images`.
        method: "logistic", L2-regularised logistic regression; "prototype", the means of the classes as weights, quick.
        regularisation: values of scikit-learn's C to choose from, on a validation split.
        validation_share: of the images to fit on, of each class; they are fitted on too once C is chosen.
        projected: measure encoder and projector together (the paper's figure 6) instead of the encoder (figure D).
        seed: of the splits.
        **extraction: options of `features`.

    Returns:
        "top1" and "top5", shares of images.

    Raises:
        DataError: for data that cannot be used.
        SettingsError: if scikit-learn is not installed.
    """
    check_share(validation_share)
    who = subject(examined)
    fitting, scoring = labelled_images(data, seed=seed)
    vectors, others = (
        normalised(features(who, part.images, pool="mean", projected=projected, **extraction).pooled())
        for part in (fitting, scoring)
    )
    if method == "prototype":
        decide, chosen = prototypes(vectors, fitting.labels), dict[str, Any]()
    elif method == "logistic":
        decide, chosen = _chosen(vectors, fitting, regularisation, validation_share, seed)
    else:
        raise SettingsError(f"method is {method!r}.", "Choose 'logistic' or 'prototype'.")
    scores = decide(others)
    settings = {
        "method": method,
        "fitted_on": len(vectors),
        "scored_on": len(others),
        "classes": len(np.unique(fitting.labels)),
        "features": "encoder+projector" if projected else "encoder",
        "seed": seed,
        **chosen,
    }
    return ProbeResult(
        "linear", {f"top{k}": score_of(top_k(scores, scoring.labels, k), seed) for k in (1, TOP)}, settings
    )


def prototype_probe(examined: object, data: object, **options: Any) -> ProbeResult:
    """The quick variant of `linear_probe`: class means as weights.

    Args:
        examined, data, **options: as for `linear_probe`.
    """
    found = linear_probe(examined, data, **{**options, "method": "prototype"})
    return ProbeResult("prototype", found.scores, found.settings)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """(n, width) rows of length one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def prototypes(vectors: np.ndarray, labels: np.ndarray) -> Any:
    """A function from (n, width) to (n, classes) similarities with the normalised class means."""
    classes = int(labels.max()) + 1
    means = np.full((classes, vectors.shape[1]), np.nan)
    for value in np.unique(labels):
        means[value] = vectors[labels == value].mean(axis=0)
    weights = normalised(means)
    # a class without images is never chosen
    return lambda others: np.nan_to_num(others @ weights.T, nan=-np.inf)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """(n,) whether each row's label is among its k highest scores; (n, classes) scores."""
    classes = scores.shape[1]
    known = labels < classes
    own = scores[np.arange(len(scores)), np.where(known, labels, 0)]
    above = (scores > own[:, None]).sum(axis=1)
    # a tie is broken by the order of the classes, as argmax does
    tied = ((scores == own[:, None]) & (np.arange(classes) < labels[:, None])).sum(axis=1)
    return ((above + tied < k) & known).astype(np.float64)


def _chosen(
    vectors: np.ndarray, fitting: Labelled, values: Sequence[float], share: float, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The classifier with the C that is best on a validation split, fitted on everything; and what chose it."""
    if not values or min(values) <= 0:
        raise SettingsError(f"regularisation is {list(values)}.", "Give positive values of C.")
    labels = fitting.labels
    held = stratified(labels, share, seed, fitting.names, "the images to fit on")
    accuracy = {}
    for value in values:
        decide = _logistic(vectors[~held], labels[~held], value)
        accuracy[value] = float(top_k(decide(vectors[held]), labels[held], 1).mean())
    # of equally good ones the strongest regularisation
    best = max(sorted(values), key=lambda value: accuracy[value])
    validation = {str(value): round(share, 6) for value, share in accuracy.items()}
    return _logistic(vectors, labels, best), {"C": best, "validation_top1": validation}


def _logistic(vectors: np.ndarray, labels: np.ndarray, value: float) -> Any:
    linear_model = require("sklearn.linear_model", "probes", "The linear probe")
    exceptions = require("sklearn.exceptions", "probes", "The linear probe")
    if len(np.unique(labels)) < 2:
        raise SettingsError("There is one class only.", "Give images of at least two classes.")
    model = linear_model.LogisticRegression(C=value, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # the protocol stops at so many iterations, converged or not
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        model.fit(vectors, labels)

    def decide(others: np.ndarray) -> np.ndarray:
        found = model.decision_function(others)
        found = np.stack([-found, found], axis=1) if found.ndim == 1 else found
        scores = np.full((len(others), int(model.classes_.max()) + 1), -np.inf)
        scores[:, model.classes_] = found
        return scores

    return decide
