"""Encoders from a folder or the Hub: only what is safe to read is read, and only what is whole is returned.

Downloaded are JSON files and safetensors, never pickles, and code only when asked for. Hashes are compared with
`pivot.json`, because a download is checked for its size alone.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, overload

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from pivot_plugin.errors import EncoderError

from .record import PROVENANCE, Origin, check_hashes, read_provenance
from .secrets import hidden

logger = logging.getLogger(__name__)

READ = ("*.json", "*.safetensors", "README.md", "*.png")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Download:
    """How the files of an encoder are had.

    Attributes:
        revision, trust_remote_code, token, cache_dir, local_files_only: as for `load_encoder`.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


@overload
def load_encoder(
    path: str | Path,
    revision: str | None = None,
    *,
    with_processor: Literal[True],
    trust_remote_code: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor]: ...


@overload
def load_encoder(
    path: str | Path,
    revision: str | None = None,
    *,
    with_processor: Literal[False] = False,
    trust_remote_code: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel: ...


def load_encoder(
    path: str | Path,
    revision: str | None = None,
    *,
    with_processor: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel | tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a stand-alone encoder from a folder or the Hugging Face Hub; of a CLIP or SigLIP the vision half.

    Its `pivot_origin` tells the commit it was read at and its provenance. An encoder that is not from this package
    loads too, with a note that it has no provenance.

    Args:
        path: a folder written by `PivotResult.save`, any other transformers encoder folder, or a Hub id.
        revision: branch, tag or commit on the Hub.
        with_processor: return (encoder, image processor).
        trust_remote_code: load an encoder that brings its own code or pickled weights, and run what is in them; what
            that is, is said.
        token: for a private repository; the one you are logged in with where None.
        cache_dir: of downloads; the Hub's own where None.
        local_files_only: read the cache and ask nobody; so does HF_HUB_OFFLINE=1.

    Returns:
        The encoder in eval mode and the precision it was saved in, or a pair with its image processor.

    Raises:
        EncoderError: if files are missing or changed since they were written, weights do not fill the model, or the
            encoder would run code.
    """
    download = Download(
        revision=revision,
        trust_remote_code=trust_remote_code,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    origin = fetch(path, download)
    encoder = encoder_of(origin, trust_remote_code)
    if not with_processor:
        return encoder
    try:
        return encoder, AutoImageProcessor.from_pretrained(origin.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{origin.name} holds no image processor: {hidden(error, token)}",
            "Load one of the same size from its base.",
        ) from error


def fetch(path: str | Path, download: Download) -> Origin:
    """The files of an encoder on this machine, hashes compared; nothing of them is loaded yet.

    Args:
        path: as for `load_encoder`.
        download: how they are had.

    Raises:
        EncoderError: as `load_encoder`.
    """
    folder, repo, commit = Path(path), None, None
    if folder.is_dir():
        if download.revision is not None:
            raise EncoderError(
                f"{str(path)!r} is a folder, and has no revision {download.revision!r}.", "Leave revision out."
            )
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    else:
        repo = str(path)
        folder, commit, names = _downloaded(repo, download)
    record = read_provenance(folder)
    _refuse_code(repo or str(folder), folder, names, record, download.trust_remote_code)
    if record.get("weights") == "lora":
        raise EncoderError(
            f"{repo or str(folder)!r} holds the LoRA of an encoder, not an encoder.",
            "Load its base with transformers, then PeftModel.from_pretrained(base, <this>).merge_and_unload().",
        )
    check_hashes(folder, record)
    if not record:
        logger.warning("%s has no %s: it has no provenance, and no hashes to check.", repo or folder.name, PROVENANCE)
    return Origin(folder, repo, commit, record)


def encoder_of(origin: Origin, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load what was fetched.

    Args:
        origin: as `fetch` gives it.
        trust_remote_code: as for `load_encoder`.

    Raises:
        EncoderError: if the folder holds no encoder, or its weights do not fill it.
    """
    folder = origin.folder
    try:
        recorded = origin.record.get("encoder_class")
        encoder_cls = _encoder_class(folder, recorded, origin.record.get("encoder_package"), trust_remote_code)
        safe = None if trust_remote_code else True
        encoder, loading = encoder_cls.from_pretrained(
            folder,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=safe,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EncoderError(
            f"{str(folder)!r} holds no encoder that transformers can load: {error}", "Give the folder of an encoder."
        ) from error
    # a vision class pointed at a whole MLLM loads with random weights and a mere warning
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
        raise EncoderError(
            f"{str(folder)!r} does not fill a {type(encoder).__name__}: {len(absent)} tensors are missing or of "
            f"another size, the first {absent[0]!r}.",
            "Give the folder of a stand-alone encoder, not of a whole MLLM.",
        )
    if loading["unexpected_keys"]:
        _refuse_left_over(origin, encoder, sorted(loading["unexpected_keys"]))
    tower = encoder.get_encoder(modality="image")
    if type(encoder).__name__ != recorded and isinstance(tower, PreTrainedModel) and not encoder.can_generate():
        # of a dual encoder such as CLIP or SigLIP, the half that sees
        encoder = tower
    if origin.repo:
        encoder.config._name_or_path = origin.repo
    encoder.pivot_origin = origin
    return encoder.eval()


def _refuse_left_over(origin: Origin, encoder: PreTrainedModel, names: list[str]) -> None:
    """Refuse weights that are more than the class they are said to be of; others' heads are named and left out.

    Raises:
        EncoderError: with their number and the first of them.
    """
    finding = f"{len(names)} tensors are left over, the first {names[0]!r}"
    if origin.record or type(encoder).__name__ in (encoder.config.architectures or ()):
        raise EncoderError(
            f"{str(origin.folder)!r} holds more than a {type(encoder).__name__}: {finding}.",
            "It was written under other names, or for another class: save or download it again.",
        )
    logger.warning("Of %s %s: no part of a %s.", origin.name, finding, type(encoder).__name__)


def _downloaded(repo: str, download: Download) -> tuple[Path, str | None, list[str]]:
    """Folder of a repository's files, its commit, and the names of all files it has there."""
    names: list[str] = []
    patterns = list(READ) + (["*.py", *(f"*{suffix}" for suffix in PICKLES)] if download.trust_remote_code else [])
    api, local_files_only = HfApi(token=download.token), download.local_files_only

    def names_at(commit: str | None) -> list[str]:
        present = [str(file.rfilename) for file in api.model_info(repo, revision=commit).siblings or []]
        for name in present:
            if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
                raise EncoderError(
                    f"{repo} has a file named {name!r}, which leads out of its folder.", "Do not use this repository."
                )
        return present

    try:
        try:
            if not local_files_only:
                names = names_at(download.revision)
        except (OfflineModeIsEnabled, ConnectionError) as error:
            logger.info("%s is looked for in the cache alone: %s", repo, hidden(error, download.token))
            local_files_only = True
        folder = Path(
            snapshot_download(
                repo,
                revision=download.revision,
                token=download.token,
                cache_dir=download.cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )
        if not local_files_only:
            # of the commit that came down, should the branch have moved meanwhile
            names = names_at(folder.name)
    except EncoderError:
        raise
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise EncoderError(
            f"{repo!r} is no folder, and no such repository could be had: {hidden(error, download.token)}",
            "Check the path or the id, the revision, and whether the repository needs a token.",
        ) from error
    commit = folder.name if _COMMIT.fullmatch(folder.name) else download.revision
    return folder, commit, names or [str(file.relative_to(folder)) for file in folder.rglob("*")]


def _refuse_code(
    name: str, folder: Path, files: Sequence[str], record: dict[str, Any], trust_remote_code: bool
) -> None:
    """Refuse what would run code: modules the configuration names, and pickles where no safetensors are."""
    code = sorted({entry for file in folder.glob("*.json") for entry in _auto_map(file)})
    scripts = sorted(file for file in files if file.endswith(".py"))
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    # beside safetensors, older repositories keep pickles, which are not even downloaded; ours have none
    read = pickles if record or not any(file.endswith(".safetensors") for file in files) else []
    if not (code or scripts or read):
        if pickles:
            logger.info("%s also has %s, which are not read.", name, ", ".join(pickles))
        return
    runs = [*(f"class {entry}" for entry in code), *scripts, *read]
    if not trust_remote_code:
        raise EncoderError(
            f"{name} would run code from its author: {', '.join(runs)}.",
            "Use an encoder in safetensors of a transformers class, or read that code and pass trust_remote_code=True.",
        )
    logger.warning("%s runs code from its author, as trust_remote_code=True allows: %s.", name, ", ".join(runs))


def _auto_map(file: Path) -> list[str]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    classes = settings.get("auto_map") if isinstance(settings, dict) else None
    if isinstance(classes, dict):
        return [str(value) for value in classes.values()]
    return [str(classes)] if classes else []


def has_auto_class(encoder: PreTrainedModel) -> bool:
    """Whether AutoModel makes an encoder of its class out of its configuration; of Qwen2-VL's tower it does not.

    Args:
        encoder: stand-alone.
    """
    return type(encoder) in _auto_classes(encoder.config)


def _auto_classes(config: PreTrainedConfig) -> tuple[type[Any], ...]:
    mapping = AutoModel._model_mapping  # type: ignore[attr-defined]
    classes = mapping.get(type(config), ())
    return tuple(classes) if isinstance(classes, list | tuple) else (classes,)


def _encoder_class(folder: Path, recorded: object, package: object, trust_remote_code: bool) -> type[Any]:
    """The transformers class recorded at saving, AutoModel where none is.

    AutoModel does not know every tower (Qwen2-VL's), and of some it gives a module inside the one that was saved.

    Args:
        folder: of the encoder.
        recorded: name of the class.
        package: of transformers.models that it is of; older records have none.
        trust_remote_code: as for `load_encoder`.
    """
    if (encoder_cls := _transformers_class(recorded, package)) is not None:
        return encoder_cls
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if _auto_classes(config):
            return AutoModel
    except ValueError:
        pass
    return _transformers_class(recorded, str(model_type).removesuffix("_vision")) or AutoModel


def _transformers_class(name: object, package: object) -> type[PreTrainedModel] | None:
    """A class of transformers by its name and package; None for what is not there, such as strangers may write."""
    if not (isinstance(name, str) and isinstance(package, str) and name.isidentifier() and package.isidentifier()):
        return None
    try:
        modeling = import_module(f"transformers.models.{package}.modeling_{package}")
    except ImportError:
        return None
    found = getattr(modeling, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
