"""Completions drawn from a model, and pairs made of them.

engines.py sampling.py               completions: by transformers or vLLM, resumable
grading.py                           answers and their scores, batch by batch
ranking.py distillation.py           completions into pairs
"""
