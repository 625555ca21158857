"""Rows from whatever people bring, in one normal form: TRL's conversational vision layout.

sources.py jsonlines.py images.py    where rows and images come from
layout.py published.py stacks.py     whatever layout into the normal form
rows.py skipped.py                   rows with random access, and the list of those left out
pairs.py questions.py conversations.py   the three kinds of rows
records.py checking.py               one look at every row, and the report of it
split.py storage.py                  held out, saved, put on the Hub

Knows no model and no trainer.
"""
