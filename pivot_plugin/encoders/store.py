"""An encoder's folder: plain transformers files, and beside them the projector, the provenance and a card.

config.json  model.safetensors  preprocessor_config.json    what AutoModel and AutoImageProcessor read
projector.safetensors                                       the projector as trained
pivot.json                                                  where the encoder comes from, and a hash of every file
README.md                                                   the model card
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

import pivot_plugin
from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.errors import EncoderError

PROVENANCE = "pivot.json"
FORMAT = 1


def save_encoder(adapter: VisionAdapter, processor: object, folder: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write the vision tower of an MLLM as a stand-alone encoder.

    The folder is written aside and renamed, so that an old one stays whole until the new one is complete.

    Args:
        adapter: of the MLLM.
        processor: the MLLM's, for its image processor.
        folder: to write; an encoder folder that is there already is replaced, any other folder must be empty.
        provenance: what to record beside class, path, layer, versions and hashes.

    Raises:
        EncoderError: if the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / PROVENANCE).exists():
        raise EncoderError(
            f"Folder {str(folder)!r} is not empty and holds no encoder of ours.", "Choose another folder, or empty it."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise EncoderError(f"{str(folder)!r} cannot be written: {error}.", "Choose another folder.") from error
    try:
        aside.chmod(0o755)
        encoder = adapter.extract()
        encoder.save_pretrained(aside)
        adapter.image_processor(processor).save_pretrained(aside)
        projector = {
            name: parameter.detach().cpu().contiguous().clone()
            for name, parameter in adapter.model.named_parameters()
            if adapter.part_of(name) == "projector"
        }
        save_file(projector, aside / "projector.safetensors")
        record = {
            "format": FORMAT,
            "family": adapter.family,
            "encoder_class": type(encoder).__name__,
            "mllm_class": type(adapter.model).__name__,
            "tower_path": adapter.tower_path,
            "feature_layer": adapter.feature_layer,
            "unread": list(adapter.unread_paths()),
            "versions": {
                "pivot_plugin": pivot_plugin.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            **provenance,
            "sha256": {path.name: _sha256(path) for path in sorted(aside.glob("*.safetensors"))},
        }
        (aside / PROVENANCE).write_text(json.dumps(record, indent=2, default=str) + "\n")
        (aside / "README.md").write_text(_card(record))
        _replace(folder, aside)
    except OSError as error:
        raise EncoderError(
            f"{str(folder)!r} cannot be written: {error}.", "What was there before is unchanged; make room and repeat."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _replace(folder: Path, aside: Path) -> None:
    """Put a finished folder in the place of an old one."""
    old = aside.with_name(f"{aside.name}.old")
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_encoder(path: str | Path) -> PreTrainedModel:
    """Load a stand-alone encoder from a folder or the Hugging Face Hub.

    Args:
        path: a folder written by `PivotResult.save`, any other transformers encoder folder, or a Hub id.

    Returns:
        The encoder in eval mode and the precision it was saved in.

    Raises:
        EncoderError: if files are missing or changed since they were written, or weights do not fill the model.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "README.md"]))
        except Exception as error:
            raise EncoderError(
                f"{str(path)!r} is no folder, and no such repository could be had: {error}",
                "Check the path or the id, and whether the repository needs a token.",
            ) from error
    record = _provenance(folder)
    for name, expected in record.get("sha256", {}).items():
        file = folder / Path(name).name
        if not file.is_file():
            raise EncoderError(f"{name} is missing in {str(folder)!r}.", "Save or download the encoder again.")
        if (found := _sha256(file)) != expected:
            raise EncoderError(
                f"{name} in {str(folder)!r} has changed since it was saved: sha256 {found[:12]}..., {PROVENANCE} "
                f"says {str(expected)[:12]}....",
                "Save or download the encoder again.",
            )
    try:
        kind = _encoder_class(folder, record.get("encoder_class"))
        encoder, loading = kind.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError) as error:
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
    return encoder.eval()


def _provenance(folder: Path) -> dict[str, Any]:
    file = folder / PROVENANCE
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EncoderError(f"{str(file)!r} is not JSON: {error}.", "Save or download the encoder again.") from error
    if not isinstance(record, dict) or not isinstance(record.get("sha256", {}), dict):
        raise EncoderError(f"{str(file)!r} is no provenance record.", "Save or download the encoder again.")
    return record


def _encoder_class(folder: Path, recorded: str | None) -> type[Any]:
    """AutoModel, or for towers AutoModel does not know (Qwen2-VL's) the transformers class recorded at saving."""
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder)
        if type(config) in AutoModel._model_mapping:  # type: ignore[attr-defined]
            return AutoModel
    except ValueError:
        pass
    package = str(model_type).removesuffix("_vision")
    if recorded and recorded.isidentifier() and package.isidentifier():
        modeling = import_module(f"transformers.models.{package}.modeling_{package}")
        found = getattr(modeling, recorded, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(record: Mapping[str, Any]) -> str:
    """A short model card: what the encoder is, how to load it, what was measured."""
    layer = record["feature_layer"]
    reads = "its last output" if layer is None else f"hidden state {layer}"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-feature-extraction",
        "tags: [pivot, trl]",
        "---",
        "",
        f"# {record['encoder_class']}, improved by preference optimisation",
        "",
        f"The vision tower of a {record['mllm_class']}, trained with pivot_plugin. The MLLM reads {reads}.",
        "",
        "```python",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'encoder = AutoModel.from_pretrained("<this folder>")',
        'processor = AutoImageProcessor.from_pretrained("<this folder>")',
        "```",
        "",
    ]
    metrics = record.get("metrics") or {}
    if metrics:
        names = sorted({name for values in metrics.values() for name in values})
        lines += ["| held-out pairs | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
        lines += [
            f"| {name} | " + " | ".join(f"{values[name]:.4f}" for values in metrics.values()) + " |" for name in names
        ]
        lines.append("")
    return "\n".join(lines)
