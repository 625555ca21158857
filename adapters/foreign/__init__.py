"""Checkpoints and objects of other repositories, read as transformers' own classes around the same parameters.

plugin.py       the hooks
reading.py      which layout a folder, a Hub id or an object has
weights.py      tensors of a folder or an object, by the repository's names
names.py        how names and tensors of two forms correspond, in both directions
building.py     transformers' class around them, on the meta device until every tensor has its place
sharing.py      an object trained in place: whatever no longer shares memory is brought back
writing.py      the way back to a folder of the repository's form
tokens.py       tokenizers, the token that stands for an image, and prompt forms
llava.py        LLaVA, LLaVA-NeXT and the checkpoints of PIVOT's authors
internvl.py     InternVLChatModel

None of a repository's code is run, and nothing here needs it to be installed.
"""

from .reading import read
from .sharing import bring_back
from .writing import write_back

__all__ = ["bring_back", "read", "write_back"]
