"""Makers: from pictures to questions whose answers are known, to pairs, and to rejected pictures.

protocol.py pictures.py views.py             what a maker is, is given, and gives back
geometry.py comparing.py captions.py phrases.py   the built-in makers of questions
rejected.py                                  those of rejected pictures
lookup.py                                    makers by name (hook `pivot_makers`)
sources.py making.py storage.py              from what people bring to data sets, and onto disk
"""

from .lookup import maker_of, makers
from .making import Making, make
from .pictures import Picture, Pictures
from .protocol import Draw, Maker, Question, Unsuitable
from .sources import pictures_of
from .storage import write_made

__all__ = [
    "Draw",
    "Maker",
    "Making",
    "Picture",
    "Pictures",
    "Question",
    "Unsuitable",
    "make",
    "maker_of",
    "makers",
    "pictures_of",
    "write_made",
]
