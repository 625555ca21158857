"""The linear probe: how well does one linear layer on frozen features tell the classes of images?

Protocol: arXiv 2510.16333, appendix E.3 and C.3, but for the choice of the regularisation, which is made on a
validation split of the images to fit on, never on those that are scored.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from pivot_plugin.errors import SettingsError
from pivot_plugin.extras import require

from . import subjects
from .data import Labelled, labelled_images
from .extraction import features
from .scores import ProbeResult, score_of
from .splits import check_share, stratified

# arXiv 2510.16333, appendix E.3
PAPER_C = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)
MAX_ITERATIONS = 1000
TOP = 5
# (n, D) vectors to (n, K) scores
ClassScores = Callable[[np.ndarray], np.ndarray]


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
    subject = subjects.subject(examined)
    fitting, scoring = labelled_images(data, seed=seed)
    vectors, others = (
        normalised(features(subject, part.images, pool="mean", projected=projected, **extraction).pooled())
        for part in (fitting, scoring)
    )
    if method == "prototype":
        class_scores, choice = prototypes(vectors, fitting.labels), dict[str, Any]()
    elif method == "logistic":
        class_scores, choice = _logistic(vectors, fitting, regularisation, validation_share, seed)
    else:
        raise SettingsError(f"method is {method!r}.", "Choose 'logistic' or 'prototype'.")
    scores = class_scores(others)
    settings = {
        "method": method,
        "fitted_on": len(vectors),
        "scored_on": len(others),
        "classes": len(np.unique(fitting.labels)),
        "features": "encoder+projector" if projected else "encoder",
        "seed": seed,
        **choice,
    }
    return ProbeResult(
        "linear", {f"top{k}": score_of(top_k(scores, scoring.labels, k), seed) for k in (1, TOP)}, settings
    )


def prototype_probe(examined: object, data: object, **options: Any) -> ProbeResult:
    """The quick variant of `linear_probe`: class means as weights.

    Args:
        examined, data, **options: as for `linear_probe`.
    """
    result = linear_probe(examined, data, **{**options, "method": "prototype"})
    return ProbeResult("prototype", result.scores, result.settings)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """(n, D) rows of length one; a row that is zero or no number stays so, which scikit-learn's own refuses."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def prototypes(vectors: np.ndarray, labels: np.ndarray) -> ClassScores:
    """A function from (n, D) to (n, K) similarities with the normalised class means."""
    classes = int(labels.max()) + 1
    means = np.full((classes, vectors.shape[1]), np.nan)
    for value in np.unique(labels):
        means[value] = vectors[labels == value].mean(axis=0)
    weights = normalised(means)
    # a class without images is never chosen
    return lambda others: np.nan_to_num(others @ weights.T, nan=-np.inf)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """(n,) whether each row's label is among its k highest scores; (n, K) scores."""
    classes = scores.shape[1]
    fitted = labels < classes
    of_label = scores[np.arange(len(scores)), np.where(fitted, labels, 0)]
    above = (scores > of_label[:, None]).sum(axis=1)
    # a tie is broken by the order of the classes, as argmax does
    tied = ((scores == of_label[:, None]) & (np.arange(classes) < labels[:, None])).sum(axis=1)
    return ((above + tied < k) & fitted).astype(np.float64)


def _logistic(
    vectors: np.ndarray, fitting: Labelled, values: Sequence[float], share: float, seed: int
) -> tuple[ClassScores, dict[str, Any]]:
    """The classifier with the C that is best on a validation split, fitted on everything; and what chose it."""
    linear_model, model_selection, exceptions = (
        require(f"sklearn.{name}", "probes", "The linear probe")
        for name in ("linear_model", "model_selection", "exceptions")
    )
    if not values or min(values) <= 0:
        raise SettingsError(f"regularisation is {list(values)}.", "Give positive values of C.")
    labels = fitting.labels
    if len(np.unique(labels)) < 2:
        raise SettingsError("There is one class only.", "Give images of at least two classes.")
    validation = stratified(labels, share, seed, fitting.names, "the images to fit on")
    search = model_selection.GridSearchCV(
        linear_model.LogisticRegression(max_iter=MAX_ITERATIONS),
        # the first of equally good ones is taken: the strongest regularisation
        {"C": sorted(set(values))},
        cv=model_selection.PredefinedSplit(np.where(validation, 0, -1)),
    )
    with warnings.catch_warnings():
        # the protocol stops at so many iterations, converged or not
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        search.fit(vectors, labels)
    model = search.best_estimator_

    def class_scores(others: np.ndarray) -> np.ndarray:
        decisions = model.decision_function(others)
        decisions = np.stack([-decisions, decisions], axis=1) if decisions.ndim == 1 else decisions
        scores = np.full((len(others), int(model.classes_.max()) + 1), -np.inf)
        scores[:, model.classes_] = decisions
        return scores

    accuracy = zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    return class_scores, {
        "C": search.best_params_["C"],
        "validation_top1": {str(params["C"]): round(float(score), 6) for params, score in accuracy},
    }
