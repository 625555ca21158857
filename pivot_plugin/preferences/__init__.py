"""Preference pairs in one normal form, TRL's conversational vision layout: loaded, checked, and made.

images.py jsonlines.py sources.py    where rows and images come from
layout.py published.py               whatever layout into the normal form
records.py checking.py                one look at every row, and the report of it
pairs.py split.py storage.py         data sets of pairs: read, split, saved, put on the Hub
conversations.py                      what comes before pairs: captions and conversations for fine-tuning
engines.py sampling.py               completions drawn from a model
ranking.py distillation.py           completions into pairs
"""

from .checking import CheckReport, check
from .conversations import ConversationDataset, load_conversations
from .distillation import self_distill
from .pairs import OnBadRow, PairDataset, PairStream, QuestionDataset, load, load_questions
from .ranking import rank
from .sampling import sample
from .split import hold_out
from .storage import push, save

__all__ = [
    "CheckReport",
    "ConversationDataset",
    "OnBadRow",
    "PairDataset",
    "PairStream",
    "QuestionDataset",
    "check",
    "hold_out",
    "load",
    "load_conversations",
    "load_questions",
    "push",
    "rank",
    "sample",
    "save",
    "self_distill",
]
