"""Makers: from pictures to questions whose answers are known, to pairs, and to rejected pictures.

protocol.py pictures.py      what a maker is, is given, and gives back
lookup.py                    makers by name (hook `pivot_makers`)
"""

from .lookup import maker_of, makers
from .pictures import Picture, Pictures
from .protocol import Draw, Maker, Question, Unsuitable

__all__ = ["Draw", "Maker", "Picture", "Pictures", "Question", "Unsuitable", "maker_of", "makers"]
