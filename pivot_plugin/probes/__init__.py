"""Probes: what a frozen encoder's features make easy to tell, where a loss looks, and what else training changes.

    features(model, images)                 frozen patch features with their grid
    linear_probe, prototype_probe           images with a class each
    knn_probe                               the same by nearest neighbours, fitting nothing
    segmentation_probe                      images with a class per pixel
    saliency, pointing_game                 the gradient of a pair's loss, as a map over its image
    alignment, ravel                        neighbours shared with a text model
    vqa                                     questions, with rewards as judges
    run_benchmarks                          the paper's sixteen, by lmms-eval

Each takes what is examined (a model, an encoder, a folder, a Hub id, the result of a run) and data, and returns a
`ProbeResult`: scores with 95 % intervals.

Probes:
    linear.py segmentation.py            what a small head on frozen features tells
    knn.py neighbours.py ravel.py        which things lie near each other, without any head
    gradients.py pointing.py             where a loss looks, and whether that is where the object is
    questions.py benchmarks.py           what the whole MLLM answers
    exploration.py generalization.py     measures of roll-outs, and of gains beyond the training distribution
Tools:
    subjects.py                          whatever has an encoder, as a `Subject`
    data.py splits.py                    images with classes or masks, to fit on and to score on
    extraction.py                        frozen features, kept on disk
    scores.py comparison.py              intervals, paired tests, subjects side by side
    extracted.py                         towers taken out of MLLMs, to be compared by themselves
    lookup.py storage.py                 probes by name, their results on disk

Notation for shapes: n samples or images, P patches of one image in raster order, D width of a feature, K classes,
R resamples, C tokens of a completion. A grid is (rows, columns) of patches, a size is (width, height) in pixels.
"""

from .benchmarks import GROUPS, benchmark_command, run_benchmarks
from .data import Labelled, Masked, labelled_images, masked_images
from .exploration import candidate_set_sizes, pass_at_k, rollout_branching_factor
from .extraction import Features, features
from .generalization import generalization_factor, plot_generalization
from .gradients import PairSaliency, pointing_game, saliency
from .knn import knn_probe
from .linear import linear_probe, prototype_probe
from .lookup import ProbeTask
from .neighbours import Captioned, alignment, mutual_knn
from .questions import vqa
from .ravel import ravel
from .scores import Difference, ProbeResult, Score, difference
from .segmentation import patch_labels, segmentation_probe
from .splits import PRESETS
from .subjects import Subject, subject

__all__ = [
    "GROUPS",
    "PRESETS",
    "Captioned",
    "Difference",
    "Features",
    "Labelled",
    "Masked",
    "PairSaliency",
    "ProbeResult",
    "ProbeTask",
    "Score",
    "Subject",
    "alignment",
    "benchmark_command",
    "candidate_set_sizes",
    "difference",
    "features",
    "generalization_factor",
    "knn_probe",
    "labelled_images",
    "linear_probe",
    "masked_images",
    "mutual_knn",
    "pass_at_k",
    "patch_labels",
    "plot_generalization",
    "pointing_game",
    "prototype_probe",
    "ravel",
    "rollout_branching_factor",
    "run_benchmarks",
    "saliency",
    "segmentation_probe",
    "subject",
    "vqa",
]
