"""A linear probe on frozen patch features: which class covers each patch?"""

from dataclasses import dataclass

import numpy as np

from pivot_plugin.extras import require


@dataclass(frozen=True)
class PatchProbe:
    """Scores of a linear probe on the patches of images it was not fitted on.

    Attributes:
        accuracy: share of patches classified right.
        mean_iou: intersection over union, averaged over the classes that occur.
        interval: 95 % bootstrap interval of `mean_iou`, over images.
    """

    accuracy: float
    mean_iou: float
    interval: tuple[float, float]


def probe_patches(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    seed: int = 0,
    resamples: int = 200,
) -> PatchProbe:
    """Fit multinomial logistic regression on patches and score it on others.

    Features are standardised on the fitting set; L2 with C=1, at most 300 iterations.

    Args:
        features, test_features: (images, patches, width).
        labels, test_labels: (images, patches) integer classes.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        SettingsError: if scikit-learn is not installed.

    Source: linear evaluation of patch tokens; the paper's segmentation probe has an MLP (arXiv 2510.16333, E.5).
    """
    linear_model = require("sklearn.linear_model", "probes", "The linear probe")
    width = features.shape[-1]
    flat = features.reshape(-1, width)
    mean, spread = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    probe = linear_model.LogisticRegression(C=1.0, max_iter=300)
    probe.fit((flat - mean) / spread, labels.reshape(-1))
    predicted = probe.predict((test_features.reshape(-1, width) - mean) / spread).reshape(test_labels.shape)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(test_labels), len(test_labels)) for _ in range(resamples)]
    scores = [mean_iou(predicted[draw], test_labels[draw]) for draw in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    return PatchProbe(
        accuracy=float((predicted == test_labels).mean()),
        mean_iou=mean_iou(predicted, test_labels),
        interval=(float(low), float(high)),
    )


def mean_iou(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Intersection over union, averaged over the classes in `labels`; arrays of equal shape."""
    scores = []
    for value in np.unique(labels):
        hit, either = (predicted == value) & (labels == value), (predicted == value) | (labels == value)
        scores.append(hit.sum() / either.sum())
    return float(np.mean(scores))
