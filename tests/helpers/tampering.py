"""Encoder folders that somebody has changed, and what became of loading them."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import pivot_plugin as pivot
from pivot_plugin.errors import PivotError
from pivot_plugin.files import sha256

VALUES: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 224, 10**6, 10**9, 10**18, -(10**9), 10**400),
    *(0.0, 1.5, -0.5, 1e-30, 1e30, math.nan, math.inf, -math.inf),
    *("", "x", "clip", "gelu", "../../outside", "/etc/passwd", "a" * 5000, "\ud800", "<|im_end|>", "float16", "int8"),
    *(True, False, None, [], [0], [1, 2], [0.0, 0.0, 0.0], [[[]]], {}, {"x": 1}, {"height": 0, "width": 0}),
]
MODEL_TYPES = ("llava", "clip", "siglip", "siglip_vision_model", "qwen2_vl", "vit", "bert", "timm_wrapper", "nope", "")
KEYS = (
    *("auto_map", "transformers_weights", "quantization_config", "attn_implementation", "_attn_implementation"),
    *("dtype", "torch_dtype", "architectures", "gguf_file", "per_layer_config", "vision_feature_layer", "tp_plan"),
    *("distributed_config", "base_model_name_or_path", "to_dict", "get_text_config", "sub_configs", "vision_config"),
    *("rope_parameters", "id2label", "num_labels", "image_processor_type", "processor_class", "size", "crop_size"),
    *("rescale_factor", "image_std", "image_mean", "resample", "encoder_class", "encoder_package", "format", "sha256"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "is_decoder", "problem_type"),
)
ADDED: dict[str, bytes] = {
    "adapter_config.json": b'{"base_model_name_or_path": "../outside", "peft_type": "LORA"}',
    "adapter_model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"a": "../outside/model.safetensors"}}',
    "processor_config.json": b'{"image_processor": {"image_processor_type": "ViTImageProcessor"}}',
    "image_processor_config.json": b"{}",
    "generation_config.json": b"[]",
    "modeling_x.py": b"raise SystemExit('this code ran')",
    "pytorch_model.bin": b"pickle",
    "extra.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "notes.md": b"mine",
    ".env": b"HF_TOKEN=x",
    "chat_template.jinja": b"{{ x }}",
    "tokenizer.json": b"{}",
}


@dataclass(frozen=True)
class Tampering:
    """One change of a folder.

    Attributes:
        file: that is changed.
        what: was done to it, for messages.
        change: does it, given the folder.
        record: "as found", "rewritten" for the new contents, or "removed".
    """

    file: str
    what: str
    change: Callable[[Path], None]
    record: str

    def __repr__(self) -> str:
        return f"{self.file}: {self.what}; record {self.record}"

    def apply(self, folder: Path) -> None:
        """Change the folder."""
        self.change(folder)
        file = folder / "pivot.json"
        if self.record == "removed" and not file.is_dir():
            file.unlink(missing_ok=True)
        elif self.record == "rewritten" and self.file != "pivot.json" and file.is_file():
            record = json.loads(file.read_text())
            listed = {*record["sha256"], self.file} if self.file != "README.md" else {*record["sha256"]}
            record["sha256"] = {name: sha256(folder / name) for name in sorted(listed) if (folder / name).is_file()}
            file.write_text(json.dumps(record))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        inner = [place for key, item in value.items() for place in _places(item, (*path, key))]
    elif isinstance(value, list):
        inner = [place for index, item in enumerate(value[:3]) for place in _places(item, (*path, index))]
    return [path, *inner]


def _changed(value: Any, path: tuple[Any, ...], new: Any, remove: bool) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and remove:
        copy.pop(path[0])
    else:
        copy[path[0]] = _changed(value[path[0]], path[1:], new, remove)
    return copy


def _json_of(content: bytes, name: str) -> tuple[Any, Callable[[Any], bytes]]:
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")

        def with_header(header: Any) -> bytes:
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + content[8 + length :]

        return json.loads(content[8 : 8 + length]), with_header
    return json.loads(content), lambda value: json.dumps(value).encode()


@st.composite
def tamperings(draw: st.DrawFn, folder: Path) -> Tampering:
    """Any change of any file of a folder."""
    names = sorted(path.name for path in folder.iterdir())
    record = draw(st.sampled_from(("as found", "rewritten", "rewritten", "removed")))
    kind = draw(st.sampled_from(("value", "value", "value", "key", "bytes", "file", "link", "added")))
    if kind == "added":
        name = draw(st.sampled_from(sorted(ADDED)))
        return Tampering(name, "added", lambda f: _write(f / name, ADDED[name]), record)
    structured = [name for name in names if name.endswith((".json", ".safetensors"))]
    name = draw(st.sampled_from(structured if kind in ("value", "key") else names))
    content = (folder / name).read_bytes()
    if kind == "link":
        target = draw(st.sampled_from(("/dev/zero", "/etc/passwd", "../outside/" + name, "nowhere", name)))
        return Tampering(name, f"link to {target}", lambda f: _link(f / name, target), record)
    if kind == "file":
        how = draw(st.sampled_from(("gone", "folder", "empty", "pipe")))
        return Tampering(name, how, lambda f: _replaced(f / name, how), record)
    if kind == "bytes":
        start = draw(st.integers(0, len(content) - 1))
        how = draw(st.sampled_from(("flip", "cut", "insert", "append")))
        made = {
            "flip": content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :],
            "cut": content[:start],
            "insert": content[:start] + draw(st.binary(min_size=1, max_size=9)) + content[start:],
            "append": content + b"\0" * 9,
        }[how]
        return Tampering(name, f"{how} at {start}", lambda f: _write(f / name, made), record)
    value, written = _json_of(content, name)
    places = _places(value)
    if kind == "value":
        place = draw(st.sampled_from(places))
        remove = bool(place) and draw(st.integers(0, 5)) == 0
        new = draw(st.sampled_from(MODEL_TYPES if place[-1:] == ("model_type",) else VALUES))
        what = f"without {place}" if remove else f"{place} is {str(new)[:40]!r}"
    else:
        place = (draw(st.sampled_from(KEYS)),)
        value, remove = {**value, place[0]: None}, False
        new = draw(st.sampled_from([*VALUES, {"AutoModel": "modeling_x.X"}, {"quant_method": "fp8"}, "x/kernel"]))
        what = f"with {place} {str(new)[:40]!r}"
    made = written(_changed(value, place, new, remove))
    return Tampering(name, what, lambda f: _write(f / name, made), record)


def _write(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def _replaced(file: Path, how: str) -> None:
    import os

    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "empty":
        file.touch()
    elif how == "pipe":
        os.mkfifo(file)


def state_of(encoder: Any, image_processor: Any) -> tuple[Any, ...]:
    """By what an encoder is known to be the one that was saved."""
    config = {name: value for name, value in encoder.config.to_dict().items() if name != "_name_or_path"}
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    return type(encoder).__name__, json.dumps(config, sort_keys=True, default=str), weights, image_processor.to_dict()


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two states are of one encoder."""
    return (
        (one[0], one[1], one[3]) == (other[0], other[1], other[3])
        and one[2].keys() == other[2].keys()
        and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    )


def outcome(original: Path, state: tuple[Any, ...], tampering: Tampering, scratch: Path) -> str | None:
    """Load a changed copy; None where it ended as promised, else what was wrong.

    Promised is: a PivotError that says something, or, of a folder whose record was left alone, the very encoder that
    was saved; of one whose record is a stranger's, an encoder that can be verified, whatever comes of that.

    Args:
        original: the folder as it was saved.
        state: of the encoder in it.
        tampering: the change.
        scratch: an empty folder.
    """
    folder = scratch / "encoder"
    shutil.copytree(original, folder)
    shutil.copytree(original, scratch / "outside")
    tampering.apply(folder)
    try:
        encoder, image_processor = pivot.load_encoder(folder, with_processor=True)
        if tampering.record == "as found":
            return None if same(state_of(encoder, image_processor), state) else "accepted in silence"
        pivot.verify(folder)
        return None
    except PivotError as error:
        return None if error.finding and error.remedy else f"an error without words: {error!r}"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:150]}"
