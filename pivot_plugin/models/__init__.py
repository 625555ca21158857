"""Models: found, loaded, told apart, and left as they were.

loading.py                           an MLLM and its processor by name
find.py                              the adapter of a model's family, and whether a processor belongs to it
fingerprints.py                      keys of a model's and a processor's content
image_features.py                    each distinct image encoded once

Knows no data set and no trainer.
"""
