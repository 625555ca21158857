"""Options that are one of a few words. Imports nothing, so that the command line can list them before torch loads."""

from typing import Literal, get_args

Train = Literal["encoder", "encoder+projector", "language_model", "projector", "projector+language_model", "all"]
TRAIN_CHOICES: tuple[Train, ...] = get_args(Train)
OnBadRow = Literal["raise", "skip"]
Projector = Literal["keep", "new", "first-layer"]
PairUp = Literal["best-worst", "best-each", "all"]
Reference = Literal["previous", "first"]
ImageTerm = Literal["conditional", "anchor", "attend", "reject"]
IMAGE_TERMS: tuple[ImageTerm, ...] = get_args(ImageTerm)
ExportTarget = Literal["timm", "llava-next", "internvl", "transformers-4"]
