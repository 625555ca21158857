"""A recipe as a file: read with the lines of its keys, so that a wrong one is named where it stands."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pivot_plugin.config import InstructConfig, PivotConfig
from pivot_plugin.errors import SettingsError, unknown
from pivot_plugin.objectives import ONLINE, resolve

SeedsFrom = Literal["assemble", "optimize", "transplant"]
READY = ("paper", "single-gpu", "embedded")
VARIANT = re.compile(r"0|(1\+1)|(2\+2)")
CONTROLS = ("original", "stage-1")
# keys a recipe may have, section by section; "*" stands for any
_DATA = {"path", "source", "split", "image_folder", "rows", "sample", "seed"}
_RUN = {"data", "image_folder", "eval_fraction", "on_bad_row", "batch"}
_INSTRUCT = {one.name for one in fields(InstructConfig)} - {"output_dir", "seed"}
_PAIRS = {one.name for one in fields(PivotConfig)} - {"output_dir", "seed"}
_PROBE = {"probe": None, "data": _DATA, "of": None, "options": {"*": None}}
_KEYS: dict[str, Any] = {
    "encoder": {"source": None, "*": None},
    "language_model": {"source": None, "*": None},
    "output_dir": None,
    "seeds": None,
    "seeds_from": None,
    "assemble": dict.fromkeys(("feature_layer", "chat_template")),
    "align": dict.fromkeys(_RUN | _INSTRUCT | {"plain"}) | {"data": _DATA},
    "instruct": dict.fromkeys(_RUN | _INSTRUCT | {"train", "lora"}) | {"data": _DATA},
    "optimize": dict.fromkeys(_RUN | _PAIRS | {"train", "lora", "saliency"})
    | {
        "data": _DATA,
        "eval_data": _DATA,
        "arms": {"*": dict.fromkeys(_PAIRS | {"objective"})},
        "select": _PROBE,
    },
    "transplant": {
        "language_model": {"source": None, "*": None},
        "chat_template": None,
        "projectors": None,
        "align": dict.fromkeys(_RUN | _INSTRUCT | {"plain"}) | {"data": _DATA},
        "instruct": dict.fromkeys(_RUN | _INSTRUCT | {"lora"}) | {"data": _DATA},
    },
    "evaluate": {"*": _PROBE},
}
_OPEN = {"learning_rates", "model_init_kwargs", "gradient_checkpointing_kwargs", "accelerator_config", "fsdp_config"}


@dataclass
class PivotRecipe:
    """The whole recipe, stage by stage.

    Attributes:
        encoder: a loaded encoder, its folder or Hub id, or {"source": name, ...} of a plugin (hook `pivot_sources`).
        language_model: the same of a causal language model.
        align, instruct: `data`, `batch` (rows of a step over all processes), and settings as for `pivot.align` and
            `pivot.instruct`.
        optimize: `data`, `batch`, settings as for `pivot.optimize`; `arms`: by name its `objective` (the name itself
            where not given), and settings of its own, of which `learning_rate` may be a list to choose from, by what
            `select`, a probe or a held-out metric of pairs, says of the optimised MLLM.
        transplant: `language_model` (the same where not given), `projectors`: "0" (new), "1+1" (first layer of the
            tuned one, frozen, and a new one) or "2+2"; `align` and `instruct` of the new MLLM. None: no transplant.
        evaluate: by label `probe`, `data`, `options`, and `of`: "encoder", "optimized" or "transplant".
        assemble: settings as for `pivot.assemble`.
        seeds: of everything from `seeds_from` on; stages before it are run once, with the first.
        seeds_from: "assemble", "optimize" or "transplant".
        output_dir: gets a folder per seed and stage.
    """

    encoder: Any
    language_model: Any
    align: Mapping[str, Any]
    instruct: Mapping[str, Any]
    optimize: Mapping[str, Any]
    transplant: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    assemble: Mapping[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    seeds_from: SeedsFrom = "assemble"
    output_dir: str = "pivot-recipe"

    def __post_init__(self) -> None:
        _check(self)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as everywhere but in YAML 1.1."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: str | Path) -> PivotRecipe:
    """Read a recipe.

    Args:
        path: of a YAML file, or the name of a ready one: "paper", "single-gpu" or "embedded".

    Raises:
        SettingsError: if it cannot be read, or for a key or value that is none, with its line.
    """
    name, text = _text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name} is not YAML: {error}", "Mend it at the place named.") from error
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(
            f"{name} holds no keys.", "Begin with one of the ready recipes: pivot recipe show embedded."
        )
    lines: dict[tuple[str, ...], int] = {}
    _walk(node, (), _KEYS, name, lines)
    content = yaml.load(text, Loader=_Loader)
    try:
        return PivotRecipe(**content)
    except TypeError as error:
        lacking = [key for key in ("encoder", "language_model", "align", "instruct", "optimize") if key not in content]
        raise SettingsError(
            f"{name} lacks {', '.join(lacking)}.", "See a ready recipe: pivot recipe show embedded."
        ) from error
    except SettingsError as error:
        at = next((lines[place] for place in _places(error, lines)), None)
        where = name if at is None else f"{name}, line {at}"
        raise SettingsError(f"{where}: {error.finding}", error.remedy) from error


def ready_recipe(name: str) -> str:
    """The text of a ready recipe.

    Raises:
        SettingsError: if there is none of that name.
    """
    if name not in READY:
        raise SettingsError(f"There is no ready recipe {name!r}.", f"There are {', '.join(READY)}.")
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def described(recipe: PivotRecipe) -> dict[str, Any]:
    """A recipe in words that JSON has; what is loaded already by its class and size."""
    return {name: _plain(value) for name, value in vars(recipe).items() if name != "output_dir"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"{type(value).__name__}{size}"


def _text(path: str | Path) -> tuple[str, str]:
    if str(path) in READY:
        return f"{path}.yaml", ready_recipe(str(path))
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The recipe {str(path)!r} cannot be read: {error}.",
            f"Give a YAML file, or one of {', '.join(READY)}.",
        ) from error


def _walk(
    node: yaml.MappingNode, path: tuple[str, ...], allowed: Any, name: str, lines: dict[tuple[str, ...], int]
) -> None:
    """Look at every key of a mapping, and remember where it stands."""
    for key_node, value in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        at = (*path, key)
        if at in lines:
            raise SettingsError(
                f"{name}, line {line}: {'.'.join(at)} stands there again, after line {lines[at]}.", "Keep one."
            )
        lines[at] = line
        if allowed is None:
            continue
        known = set(allowed)
        inside = allowed.get(key, allowed.get("*")) if isinstance(allowed, dict) else None
        if key not in known and "*" not in known:
            whose = f"{'.'.join(path)} has" if path else "a recipe has"
            raise unknown("key", key, known, f"{name}, line {line}: {whose} no key {key!r}.")
        if not isinstance(value, yaml.MappingNode) or key in _OPEN:
            continue
        if inside is None and path and key not in ("options",):
            raise SettingsError(f"{name}, line {line}: {'.'.join(at)} is a mapping.", "Give one value.")
        # what a plugin's maker takes is its own affair
        plugins = inside is _DATA and any(str(k.value) == "source" for k, _ in value.value)
        _walk(value, at, None if plugins else inside, name, lines)


def _places(error: SettingsError, lines: Mapping[tuple[str, ...], int]) -> list[tuple[str, ...]]:
    """Keys that a finding names, in dots, longest first."""
    named = re.findall(r"[\w-]+(?:\.[\w+-]+)*", error.finding)
    return sorted((p for p in lines if ".".join(p) in named), key=len, reverse=True)


def _check(recipe: PivotRecipe) -> None:
    """Make sure of what can be seen without loading anything."""
    if not isinstance(recipe.seeds, list | tuple) or not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        raise SettingsError(f"seeds is {recipe.seeds!r}.", "Give a list of different numbers.")
    recipe.seeds = [int(seed) for seed in recipe.seeds]
    if recipe.seeds_from not in get_args(SeedsFrom):
        raise SettingsError(f"seeds_from is {recipe.seeds_from!r}.", f"Choose one of {', '.join(get_args(SeedsFrom))}.")
    for name in ("align", "instruct", "optimize", "evaluate", "assemble"):
        if not isinstance(getattr(recipe, name), Mapping):
            raise SettingsError(f"{name} is {getattr(recipe, name)!r}.", "Give a mapping with data and settings.")
    for name in ("align", "instruct", "optimize"):
        if getattr(recipe, name).get("data") is None:
            raise SettingsError(f"{name} has no data.", "Give a path, a Hub id, or {source: name} of a plugin.")
    arms = recipe.optimize.get("arms") or {}
    if not isinstance(arms, Mapping) or not arms:
        raise SettingsError("optimize.arms names no arm.", "For example: arms: {sft: {}, dpo: {}}.")
    for arm, settings in arms.items():
        objective: str = (settings or {}).get("objective") or arm
        if arm in CONTROLS:
            raise SettingsError(f"optimize.arms.{arm} is the name of a control.", "Choose another.")
        try:
            resolve(objective)
        except SettingsError as error:
            raise SettingsError(f"optimize.arms.{arm}: {error.finding}", error.remedy) from error
        if objective in ONLINE:
            raise SettingsError(
                f"optimize.arms.{arm} is {objective}, which learns from questions.", "Arms learn from the same pairs."
            )
        rates = (settings or {}).get("learning_rate")
        if isinstance(rates, list) and len(rates) > 1 and recipe.optimize.get("select") is None:
            raise SettingsError(
                f"optimize.arms.{arm} has {len(rates)} learning rates, and nothing says how to choose.",
                "Give optimize.select: a probe on validation data, or a held-out metric such as preference_accuracy.",
            )
    for variant in (recipe.transplant or {}).get("projectors", []):
        if not VARIANT.fullmatch(str(variant)):
            raise SettingsError(f"transplant.projectors has {variant!r}.", "Choose of '0', '1+1' and '2+2'.")
    for label, probing in recipe.evaluate.items():
        if not isinstance(probing, Mapping) or "probe" not in probing:
            raise SettingsError(f"evaluate.{label} names no probe.", "Give probe, data, and options where it has any.")
        if probing.get("of", "encoder") not in ("encoder", "optimized", "transplant"):
            raise SettingsError(
                f"evaluate.{label}.of is {probing['of']!r}.", "Choose encoder, optimized or transplant."
            )
        if probing.get("of") == "transplant" and recipe.transplant is None:
            raise SettingsError(f"evaluate.{label}.of is 'transplant', and there is none.", "Describe transplant.")
