"""Is a published encoder what its record says: hashes, safe files, and the features it computes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pivot_plugin.errors import EncoderError

from .contents import PROVENANCE
from .downloading import Download
from .loading import encoder_of, fetch, image_processor_in
from .record import Origin
from .signature import differs, signature


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it is in order; None where there was nothing to compare with.
        detail: in words.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass
class Verification:
    """What was found.

    Attributes:
        origin: folder or repository, commit and provenance; None where it could not be had.
        checks: in order.
    """

    origin: Origin | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check that could be made passed, and at least hashes and features could be compared."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def provenance(self) -> dict[str, Any]:
        """Where the encoder comes from, in short."""
        record = self.origin.record if self.origin else {}
        names = (
            "encoder_class",
            "mllm_class",
            "family",
            "feature_layer",
            "blocks",
            "base",
            "data",
            "versions",
            "settings",
        )
        return {name: record[name] for name in names if name in record}


def verify(
    path: str | Path,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Verification:
    """Download an encoder, compare hashes, load it without any code of its author, and compare its features.

    Features are those of two generated pictures, compared with what was stored when the encoder was saved, within what
    other devices and versions round.

    Args:
        path: folder or Hub id.
        revision, token, cache_dir, local_files_only: as for `load_encoder`.

    Returns:
        every check; nothing is raised for an encoder that fails one.
    """
    verification = Verification()
    try:
        download = Download(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        origin = fetch(path, download, lora=True)
    except EncoderError as error:
        verification.checks.append(Check("files", False, str(error)))
        return verification
    verification.origin = origin
    if not origin.record:
        verification.checks.append(Check("files", None, f"there is no {PROVENANCE}: no hashes, no provenance"))
    else:
        # fetch has compared them
        names = list(origin.record.get("sha256", {}))
        verification.checks.append(Check("files", True, f"{', '.join(names)}: sha256 as recorded; no code, no pickles"))
    if origin.record.get("weights") == "lora":
        words = "this is the LoRA of an encoder, which has none by itself: pivot extract makes an encoder of it"
        verification.checks.append(Check("features", None, words))
        return verification
    try:
        encoder = encoder_of(origin)
        image_processor = image_processor_in(origin.folder)
    except EncoderError as error:
        verification.checks.append(Check("load", False, str(error)))
        return verification
    verification.checks.append(
        Check("load", True, f"{type(encoder).__name__}, {encoder.num_parameters():,} parameters")
    )
    stored = origin.record.get("signature")
    if not isinstance(stored, dict):
        verification.checks.append(Check("features", None, "none were recorded to compare with"))
        return verification
    try:
        difference = differs(stored, signature(encoder, image_processor))
    # the encoder runs on a picture that its image processor made, and either may be of strangers
    except Exception as error:
        difference = f"they cannot be computed: {type(error).__name__}: {error}"
    verification.checks.append(
        Check("features", difference is None, difference or "of generated pictures, as recorded")
    )
    return verification
