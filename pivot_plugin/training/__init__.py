"""Training: the prefix forest, the reference cache and the trainer.

Notation for tensor shapes, used in every file of this package:
    B  trees of a batch          N  nodes of the largest tree     S  sequences (two per pair: chosen, rejected)
    C  tokens of the longest completion                           E  scored edges       D  width of the hidden states
"""
