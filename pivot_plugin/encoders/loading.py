"""Encoders from a folder or the Hub: only what is safe to read is read, and only what is whole is returned.

Downloaded are JSON files and safetensors, never pickles, and code only when asked for. Files are compared with the
hashes in `pivot.json`, plain values with what a tower can have, and the model that they describe with the weights there
are, before any of it is built.
"""

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from pivot_plugin.errors import EncoderError, foreign_code
from pivot_plugin.files import RUN_FILE

from .contents import (
    CONFIG,
    OF_LORA,
    PICKLES,
    PROCESSOR_CONFIG,
    PROVENANCE,
    WEIGHTS,
    check_hashes,
    held_numbers,
    read_files,
)
from .downloading import Download, digest, downloaded
from .plain import check_ranges, read_plain
from .record import Origin, read_provenance

logger = logging.getLogger(__name__)

# where transformers looks for settings of models and image processors
PROCESSOR_CONFIGS = (PROCESSOR_CONFIG, "processor_config.json")
SETTINGS = (CONFIG, *PROCESSOR_CONFIGS, "generation_config.json")
# of the picture that every image processor prepares once: not square, and of whole patches of no size
TRIED = (61, 47)
REMEDY = "Give the folder of an encoder, or save or download it again."
# of the weights that a configuration describes to those there are: quantised ones are packed by eights
MOST_TIMES = 8
# numbers of tables that are made of a configuration and not saved
MOST_IN_TABLES = 1 << 26


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
    return (encoder, image_processor_in(origin.folder, trust_remote_code)) if with_processor else encoder


def fetch(path: str | Path, download: Download, lora: bool = False) -> Origin:
    """The files of an encoder on this machine, hashes compared; nothing of them is loaded yet.

    Args:
        path: as for `load_encoder`.
        download: how they are had.
        lora: whether the LoRA of an encoder is welcome, too.

    Raises:
        EncoderError: as `load_encoder`.
    """
    folder, repo, commit = Path(path), None, None
    if folder.is_dir():
        if download.revision is not None:
            raise EncoderError(
                f"{str(path)!r} is a folder, and has no revision {download.revision!r}.", "Leave revision out."
            )
        read_files(folder)
        names = [entry.name for entry in folder.iterdir()]
    else:
        repo = str(path)
        folder, commit, names = downloaded(repo, download)
    if folder.is_dir() and (folder / RUN_FILE).is_file() and not (folder / CONFIG).exists():
        inner = folder / "encoder"
        remedy = f"Its encoder is in {str(inner)!r}." if inner.is_dir() else "It left no encoder."
        raise EncoderError(f"{str(folder)!r} is the folder of a run, not of an encoder.", remedy)
    record = read_provenance(folder)
    _refuse_code(repo or str(folder), folder, names, record, download.trust_remote_code)
    of_lora = record.get("weights") == "lora"
    if of_lora and not lora:
        raise EncoderError(
            f"{repo or str(folder)!r} holds the LoRA of an encoder, not an encoder.",
            f"pivot extract {repo or folder} -o FOLDER makes an encoder of it and its base; or load its base with "
            "transformers, then PeftModel.from_pretrained(base, <this>).merge_and_unload().",
        )
    if of_lora and not (folder / OF_LORA).is_file():
        raise EncoderError(f"{repo or str(folder)!r} is of a LoRA by its record, and has no {OF_LORA}.", REMEDY)
    if (folder / OF_LORA).exists() and not of_lora:
        raise EncoderError(
            f"{repo or str(folder)!r} holds {OF_LORA} beside an encoder, by which another model would be loaded.",
            "Load its base with transformers, then PeftModel.from_pretrained(base, <this>).merge_and_unload().",
        )
    check_hashes(folder, record, digest if repo else None)
    if record and record.get("format", 1) < 2:
        logger.info("The record of %s is of an early version: settings have no hashes.", repo or folder.name)
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
    folder, recorded = origin.folder, origin.record.get("encoder_class")
    with foreign_code(f"{str(folder)!r} holds no encoder that transformers can load", REMEDY, EncoderError):
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"it has no {CONFIG}")
        settings = read_plain(folder / CONFIG)
        encoder_cls = _encoder_class(folder, recorded, origin.record.get("encoder_package"), trust_remote_code)
        if not trust_remote_code:
            _refuse_settings(folder, settings, encoder_cls)
        encoder, loading = encoder_cls.from_pretrained(
            folder,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True,
            # named below, with the first of them
            ignore_mismatched_sizes=True,
        )
    # a vision class pointed at a whole MLLM loads with random weights and a mere warning
    if loading["missing_keys"] or loading["mismatched_keys"]:
        other = [str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"]]
        absent = sorted([*loading["missing_keys"], *other])
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


def image_processor_in(folder: str | Path, trust_remote_code: bool = False) -> BaseImageProcessor:
    """The image processor of an encoder's folder, after it has prepared a picture.

    Args:
        folder: of the encoder; or the name of a model, whose image processor transformers finds.
        trust_remote_code: as for `load_encoder`.

    Raises:
        EncoderError: if there is none, or one that cannot prepare a picture.
    """
    name = f"{str(folder)!r} holds no image processor that can be used"
    with foreign_code(name, "Load one of the same size from its base.", EncoderError):
        for file in PROCESSOR_CONFIGS:
            if (Path(folder) / file).exists() and not trust_remote_code:
                check_ranges(read_plain(Path(folder) / file), file)
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        prepared = image_processor(images=[Image.new("RGB", TRIED)], return_tensors="pt")
        for value in prepared.values():
            if not torch.isfinite(value).all():
                raise ValueError("a black picture becomes what is no number")
    return cast(BaseImageProcessor, image_processor)


def _refuse_settings(folder: Path, settings: dict[str, Any], encoder_cls: type[Any]) -> None:
    """Refuse a configuration with values that cannot be, or of more than the weights there are.

    Weights that do not fill the encoder are refused in the end, but building it comes before that, and may take all
    memory there is.

    Raises:
        EncoderError: with the value, or both numbers.
    """
    check_ranges(settings, CONFIG)
    for name in settings:
        if callable(getattr(PreTrainedConfig, name, None)):
            raise EncoderError(f"{CONFIG} has {name!r}, which is no setting.", REMEDY)
    if settings.get("transformers_weights") is not None:
        raise EncoderError(
            f"{CONFIG} has its weights read from {settings['transformers_weights']!r}.", f"Keep them in {WEIGHTS}."
        )
    with torch.device("meta"):
        if encoder_cls is AutoModel:
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        else:
            model = encoder_cls._from_config(encoder_cls.config_class.from_pretrained(folder))
    held = held_numbers(folder)
    described = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(buffer.numel() for buffer in model.buffers())
    if described > MOST_TIMES * held + MOST_IN_TABLES or tables > held + MOST_IN_TABLES:
        raise EncoderError(
            f"{str(folder)!r} does not fill a {type(model).__name__}: {CONFIG} describes {described:,} weights and "
            f"{tables:,} numbers in tables, its files hold {held:,} numbers.",
            "Give the folder of a stand-alone encoder, not of a whole MLLM.",
        )


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


def _refuse_code(
    name: str, folder: Path, files: Sequence[str], record: dict[str, Any], trust_remote_code: bool
) -> None:
    """Refuse what would run code: modules the configuration names, and pickles where no safetensors are."""
    settings = [read_plain(file) for file in sorted(folder.glob("*.json")) if file.name in SETTINGS]
    code = sorted({entry for values in settings for entry in _code_in(values)})
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


def _code_in(settings: dict[str, Any]) -> Iterator[str]:
    """What settings have run: classes beside them, and kernels of repositories, in any part of them."""
    for name, value in settings.items():
        if name == "auto_map" and value:
            yield from map(str, value.values()) if isinstance(value, dict) else [str(value)]
        elif name.lstrip("_").startswith(("attn_implementation", "experts_implementation")):
            # "owner/name", or by part of the model
            yield from (str(one) for one in (value.values() if isinstance(value, dict) else [value]) if "/" in str(one))
        elif isinstance(value, dict):
            yield from _code_in(value)


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
    model_type = read_plain(folder / CONFIG).get("model_type")
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
