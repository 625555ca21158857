"""Preference pairs in one normal form, TRL's conversational vision layout: loaded, checked, and made.

images.py jsonlines.py sources.py    where rows and images come from
layout.py published.py               whatever layout into the normal form
records.py checking.py                one look at every row, and the report of it
pairs.py split.py storage.py         data sets of pairs: read, split, saved, put on the Hub
conversations.py                      what comes before pairs: captions and conversations for fine-tuning
engines.py sampling.py               completions drawn from a model
ranking.py distillation.py           completions into pairs
makers                               questions and pairs made of pictures alone
auditing.py                          what a model makes of pairs, before it is trained on them
"""

from pivot_plugin.choices import OnBadRow
from pivot_plugin.data.checking import CheckReport, check
from pivot_plugin.data.conversations import ConversationDataset, load_conversations
from pivot_plugin.data.pairs import PairDataset, PairStream, load
from pivot_plugin.data.questions import QuestionDataset, load_questions
from pivot_plugin.data.split import hold_out
from pivot_plugin.data.storage import push, save
from pivot_plugin.generation.distillation import self_distill
from pivot_plugin.generation.makers import Making, make, makers, write_made
from pivot_plugin.generation.ranking import rank
from pivot_plugin.generation.rejected_images import with_rejected_images
from pivot_plugin.generation.sampling import sample

from .auditing import AuditReport, PairAudit, audit, keep

__all__ = [
    "AuditReport",
    "CheckReport",
    "ConversationDataset",
    "Making",
    "OnBadRow",
    "PairAudit",
    "PairDataset",
    "PairStream",
    "QuestionDataset",
    "audit",
    "check",
    "hold_out",
    "keep",
    "load",
    "load_conversations",
    "load_questions",
    "make",
    "makers",
    "push",
    "rank",
    "sample",
    "save",
    "self_distill",
    "with_rejected_images",
    "write_made",
]
