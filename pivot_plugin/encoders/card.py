"""The model card: what the encoder is, how to load it, what was measured, on what it was trained."""

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from pivot_plugin import __version__

logger = logging.getLogger(__name__)

TAG = "pivot"
FAMILY_TAG = "pivot-family-"
PICTURE = "saliency.png"
_REPO = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
CITATIONS = """```bibtex
@inproceedings{pivot2026,
  title  = {RL makes MLLMs see better than SFT},
  booktitle = {International Conference on Learning Representations},
  year   = {2026},
  eprint = {2510.16333},
  archivePrefix = {arXiv}
}
@inproceedings{specs2026,
  title  = {SPECS: decoupling multimodal learning via self-distilled preference-based cold start},
  booktitle = {International Conference on Learning Representations},
  year   = {2026},
  eprint = {2510.25801},
  archivePrefix = {arXiv}
}
```"""
LIMITS = (
    "The encoder was trained through one language model on one set of preference pairs. What it gained there need not "
    "carry over to other tasks, and what was not measured above is not known. It inherits the biases and the licence "
    "terms of its base. Attach it to another model through a projector of its own and measure it there before use."
)


def card(record: Mapping[str, Any], sections: Sequence[str] = (), picture: bool = False) -> ModelCard:
    """The card of an encoder's folder, from its provenance.

    Args:
        record: provenance, as `pivot.json` has it.
        sections: markdown of plugins.
        picture: whether a picture of saliency maps lies beside it.
    """
    base = record.get("base") or {}
    mllm, name = str(base.get("mllm") or ""), str(record.get("encoder_class"))
    title = f"{name} after preference optimisation"
    lora = record.get("weights") == "lora"
    data = ModelCardData(
        base_model=_repo(base.get("encoder")) or _repo(mllm),
        library_name="peft" if lora else "transformers",
        license=str(record.get("license") or "other"),
        pipeline_tag="image-feature-extraction",
        tags=[TAG, "trl", f"{FAMILY_TAG}{record.get('family')}", *(["lora"] if lora else [])],
        datasets=[found] if (found := _repo((record.get("data") or {}).get("name"))) else None,
        model_name=title,
        eval_results=_results(record) or None,
        base_model_relation="adapter" if lora else "finetune",
    )
    layer = record.get("feature_layer")
    reads = "its last output" if layer is None else f"hidden state {layer}"
    blocks = [
        f"# {title}",
        f"The vision encoder of {_code(mllm or record.get('mllm_class'))} ({_code(record.get('mllm_class'))}), made "
        f"better by preference optimisation with pivot_plugin {_code(record.get('versions', {}).get('pivot_plugin'))}. "
        f"The model read {reads} of it.",
        "## Use",
        _use(record, lora),
        "## What was measured",
        _measured(record) or "Nothing was held out and no probe was run.",
    ]
    if picture:
        blocks += [
            "Where the loss looks in held-out pairs, before and after: gradient of the loss by the encoder's features, "
            "sum of absolute values over channels, one block per patch, each map divided by its largest value, "
            "nothing smoothed.",
            f"![Images of held-out pairs and maps of the gradient over them, before and after]({PICTURE})",
        ]
    blocks += [
        "## Training",
        _training(record),
        "## Limits",
        LIMITS,
        *(section.strip() for section in sections if section.strip()),
        "## Citation",
        CITATIONS,
        f"Written by pivot_plugin {__version__}. `pivot verify <this repository>` checks hashes and features.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n")


def licence_of(base: str) -> str | None:
    """The licence of a base model, from its card in a folder or on the Hub; None where it is not known.

    Args:
        base: folder or Hub id.
    """
    if not base:
        return None
    card = Path(base) / "README.md"
    if Path(base).is_dir() and not card.is_file():
        return None
    try:
        found = ModelCard.load(card if card.is_file() else base).data.license
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        logger.info("The licence of %s is not known (%s).", base, type(error).__name__)
        return None
    return str(found) if found else None


def _repo(name: object) -> str | None:
    """A name that can be a Hub id, for metadata that links there."""
    text = str(name or "")
    return text if _REPO.fullmatch(text) and not text.startswith(".") else None


def _code(value: object) -> str:
    """A value from a record as text that no markdown or HTML can hide in."""
    text = html.escape(str(value), quote=False).replace("`", "'").replace("\n", " ")
    return f"`{text[:200]}`"


def _use(record: Mapping[str, Any], lora: bool) -> str:
    if lora:
        return (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModel\n\n"
            f'base = AutoModel.from_pretrained("<the base encoder>")  # {record.get("encoder_class")}\n'
            'encoder = PeftModel.from_pretrained(base, "<this repository>").merge_and_unload()\n```'
        )
    layer = record.get("feature_layer")
    read = "outputs.last_hidden_state" if layer is None else f"outputs.hidden_states[{layer}]"
    keywords = "" if layer is None else ", output_hidden_states=True"
    call = f"outputs = encoder(**inputs{keywords})"
    if str(record.get("family", "")).startswith("qwen"):
        call = 'outputs = encoder(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])'
    return (
        "Without any package but transformers:\n\n"
        "```python\nfrom transformers import AutoImageProcessor, AutoModel\n\n"
        'encoder = AutoModel.from_pretrained("<this repository>")\n'
        'inputs = AutoImageProcessor.from_pretrained("<this repository>")(images=[image], return_tensors="pt")\n'
        f"{call}\nfeatures = {read}  # the layer that was trained\n```\n\n"
        "With pivot_plugin, hashes checked, and into another model:\n\n"
        "```python\nimport pivot_plugin as pivot\n\n"
        'encoder = pivot.load_encoder("<this repository>")\n'
        'pivot.graft(other_mllm, encoder)  # or projector="new", processor=..., to train a new projector\n```'
    )


def _measured(record: Mapping[str, Any]) -> str:
    tables = []
    metrics = record.get("metrics") or {}
    if metrics:
        names = sorted({name for values in metrics.values() for name in values})
        lines = ["| held-out pairs | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
        lines += [
            f"| {name} | " + " | ".join(_number(values.get(name)) for values in metrics.values()) + " |"
            for name in names
        ]
        tables.append("\n".join(lines))
    probes = record.get("probes") or {}
    if probes:
        lines = ["| probe | score | before | after |", "|---|---|---|---|"]
        for label, scores in probes.items():
            for name, values in scores.items():
                cells = (_code(label), _code(name), _scored(values.get("before")), _scored(values.get("after")))
                lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n\n95 % bootstrap intervals in brackets.")
    return "\n\n".join(tables)


def _scored(score: object) -> str:
    if not isinstance(score, Mapping):
        return ""
    value, low, high = (score.get(name) for name in ("value", "low", "high"))
    return f"{_number(value)} ({_number(low)} to {_number(high)})" if low != high else _number(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _training(record: Mapping[str, Any]) -> str:
    settings, data = record.get("settings") or {}, record.get("data") or {}
    rows = data.get("rows")
    lines = [
        f"Data: {_code(data.get('name') or 'unnamed')}"
        + (f", {rows:,} rows" if isinstance(rows, int) else "")
        + (f", fingerprint {_code(str(data.get('fingerprint'))[:16])}" if data.get("fingerprint") else "")
        + ".",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {_code(name)} | {_code(value)} |" for name, value in settings.items()),
    ]
    return "\n".join(lines)


def _results(record: Mapping[str, Any]) -> list[EvalResult]:
    """For `model-index`: held-out metrics and probe scores after training."""
    data = str((record.get("data") or {}).get("name") or "preference pairs")
    found = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="preference optimisation",
            dataset_type=data,
            dataset_name=f"held-out rows of {data}",
            metric_type=name,
            metric_value=round(float(value), 6),
        )
        for name, value in ((record.get("metrics") or {}).get("after") or {}).items()
    ]
    for label, scores in (record.get("probes") or {}).items():
        for name, values in scores.items():
            if isinstance(values.get("after"), Mapping):
                found.append(
                    EvalResult(
                        task_type="image-feature-extraction",
                        task_name=f"probe {label}",
                        dataset_type=str(label),
                        dataset_name=str(label),
                        metric_type=str(name),
                        metric_value=round(float(values["after"]["value"]), 6),
                    )
                )
    return found
