"""Models: found, loaded, told apart, and left as they were.

loading.py                           an MLLM and its processor by name
find.py                              the adapter of a model's family, and whether a processor belongs to it
fingerprints.py                      keys of a model's and a processor's content
image_features.py                    each distinct image encoded once
image_tokens.py                      text as tokens with its images expanded; which processor outputs are about images
evaluating.py                        a model looked at, and left as it was

Knows no data set and no trainer.
"""
