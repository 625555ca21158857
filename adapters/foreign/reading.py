"""Which layout a folder, a Hub id or an object has, and its model in transformers' form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from pivot_plugin.errors import ModelError, PivotError

from . import internvl, llava
from .building import Plan, build
from .sharing import link
from .tokens import tokenizer_of
from .weights import CONFIG, FolderWeights, ObjectWeights, Weights, checkpoint, configuration


@dataclass(frozen=True)
class Layout:
    """A form that checkpoints and objects of a repository have.

    Attributes:
        name: in words, for errors.
        target: what `pivot export --for` calls it.
        matches: whether a configuration is of it.
        plan: what a model is in transformers' words.
        processor: made of the plan and the model's tokenizer; completes the plan's configuration.
    """

    name: str
    target: str
    matches: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[Weights], Plan]
    processor: Callable[[Weights, Plan, PreTrainedTokenizerBase], ProcessorMixin]


LAYOUTS = (
    Layout("InternVLChatModel (1.5 to 3.5)", "internvl", internvl.matches, internvl.plan, internvl.processor),
    Layout("LLaVA, LLaVA-NeXT and PIVOT", "llava-next", llava.matches, llava.plan, llava.processor),
)


def read(
    source: str | Path | nn.Module, processor: object | None = None, weights: bool = True
) -> tuple[PreTrainedModel, ProcessorMixin] | None:
    """A checkpoint or object of a known layout as transformers' own class, and its processor.

    Args:
        source: folder, Hub id, or a loaded object, whose parameters become the model's own.
        processor: the tokenizer of an object that does not know where it was loaded from, or a processor with one.
        weights: whether a checkpoint's weights are wanted; without them the model stays on the meta device.

    Returns:
        both, or None for whatever transformers reads itself.

    Raises:
        ModelError: for a layout that neither knows, or a checkpoint that is not whole or has what transformers has no
            equal of.
    """
    if not isinstance(source, str | Path | nn.Module):
        return None
    if isinstance(source, nn.Module):
        tensors: Weights | None = _of_object(source)
        layout = None if tensors is None else _layout(tensors.config)
        if tensors is None or layout is None:
            return None
    else:
        config = configuration(source)
        if config is None:
            return None
        layout = _layout(config)
        if layout is None:
            _refuse_unknown(str(source), config)
            return None
        tensors = checkpoint(source, config, weights)
        if weights:
            tensors.check_whole()
    plan = _planned(layout, tensors)
    made = layout.processor(tensors, plan, tokenizer_of(tensors, processor, plan.config.get_text_config()))
    model, bindings = build(plan, tensors, weights)
    if isinstance(source, nn.Module):
        link(model, source, bindings)
    return model, made


def layout_of(source: str | Path) -> Layout | None:
    """The layout of a checkpoint, None for one that is not known.

    Args:
        source: folder or Hub id.
    """
    config = configuration(source)
    return None if config is None else _layout(config)


def plan_for(source: str | Path) -> tuple[FolderWeights, Plan]:
    """The weights of a checkpoint, and what they are in transformers' words.

    Args:
        source: folder or Hub id of a known layout.

    Raises:
        ModelError: for any other.
    """
    config = configuration(source)
    layout = None if config is None else _layout(config)
    if config is None or layout is None:
        raise ModelError(
            f"{str(source)!r} is no checkpoint of a known layout.",
            f"Known are {'; '.join(layout.name for layout in LAYOUTS)}.",
        )
    tensors = checkpoint(source, config, weights=True)
    tensors.check_whole()
    return tensors, _planned(layout, tensors)


def _planned(layout: Layout, tensors: Weights) -> Plan:
    """What a model is in transformers' words, or what of its configuration makes no sense."""
    try:
        return layout.plan(tensors)
    except PivotError:
        raise
    # a damaged configuration fails wherever its settings are first used, in transformers' checks too
    except Exception as error:
        raise ModelError(
            f"The configuration of {tensors.label!r}, a {layout.name}, cannot be understood: {type(error).__name__}: "
            f"{' '.join(str(error).split())}.",
            f"Compare its {CONFIG} with that of the published model.",
        ) from error


def _layout(config: Mapping[str, Any]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.matches(config)), None)


def _of_object(source: nn.Module) -> ObjectWeights | None:
    config = getattr(source, "config", None)
    settings: Any = config.to_dict() if config is not None and hasattr(config, "to_dict") else config
    if not isinstance(settings, Mapping):
        return None
    name = getattr(config, "_name_or_path", None)
    return ObjectWeights(source, {**settings, **({"_name_or_path": name} if name else {})})


def _refuse_unknown(source: str, config: Mapping[str, Any]) -> None:
    """Refuse what transformers does not read either, saying what was found and what is known.

    Raises:
        ModelError: for a model type that nobody knows.
    """
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING or (kind is None and not config.get("architectures")):
        return
    classes = ", ".join(map(str, config.get("architectures") or ())) or "none named"
    code = " Its classes come as code of its own (auto_map), which is not run." if "auto_map" in config else ""
    raise ModelError(
        f"{source!r} has a layout that neither transformers nor this package knows: its {CONFIG} says "
        f"model_type={kind!r}, class {classes}.{code}",
        f"Known besides transformers' own are {'; '.join(layout.name for layout in LAYOUTS)}. For another, install or "
        "write a plugin with the hook pivot_model.",
    )
