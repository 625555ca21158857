"""What a recipe names, opened: data by path, Hub id or a plugin's maker, encoders and language models likewise."""

import random
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState

from pivot_plugin.data.conversations import ConversationDataset, load_conversations
from pivot_plugin.data.pairs import PairDataset, load
from pivot_plugin.errors import DataError, SettingsError
from pivot_plugin.hooks import named


def made(spec: Mapping[str, Any]) -> Any:
    """What a plugin makes for {"source": name, **options}.

    Args:
        spec: of a recipe.

    Raises:
        SettingsError: for a name no plugin offers, or options it does not take.
    """
    name = str(spec["source"])
    maker = named("pivot_sources", name, "source")
    options = {key: value for key, value in spec.items() if key not in ("source", "rows")}
    try:
        return maker(**options)
    except TypeError as error:
        raise SettingsError(f"Source {name!r}: {error}.", "Give the options it takes.") from error


def conversations(spec: object, name: str, image_folder: str | None = None) -> ConversationDataset:
    """Captions or conversations of a recipe, opened.

    Args:
        spec: of a recipe: a path or Hub id, {"path": ..., "image_folder", "split", "sample", "seed"}, {"source": ...},
            or rows.
        name: of the stage, for errors.
        image_folder: what relative image paths start from.

    Raises:
        DataError, SettingsError: if they cannot be opened.
    """
    if not isinstance(spec, Mapping):
        return load_conversations(spec, name, image_folder)
    if "source" in spec:
        return load_conversations(made(spec), name, image_folder)
    folder = spec.get("image_folder", image_folder)
    return _sampled(load_conversations(_path(spec, name), name, folder, **_split(spec)), spec)


def pairs(spec: object, name: str = "optimize.data") -> PairDataset:
    """Preference pairs of a recipe, opened; as `conversations` otherwise."""
    if isinstance(spec, Mapping) and "source" not in spec:
        found = load(_path(spec, name), name=name, **_split(spec))
    else:
        found = load(made(spec) if isinstance(spec, Mapping) else spec, name=name)
    if not isinstance(found, PairDataset):
        raise DataError(f"{name} is a stream.", "Arms need the same pairs: give a list, a data set or a file.")
    return _sampled(found, spec) if isinstance(spec, Mapping) else found


def plain(spec: object) -> object:
    """Data of a probe: what a plugin makes, or as it is."""
    if not isinstance(spec, Mapping):
        return spec
    return made(spec) if "source" in spec else spec.get("path", spec)


def accumulated(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with its `batch`, rows of an optimiser step over all processes, in the trainer's words.

    Args:
        section: of a recipe.

    Raises:
        SettingsError: if the processes cannot make up such a batch.
    """
    settings = dict(section)
    batch = settings.pop("batch", None)
    if batch is None:
        return settings
    each, processes = int(settings.get("per_device_train_batch_size", 8)), PartialState().num_processes
    steps, rest = divmod(int(batch), each * processes)
    if rest or not steps or "gradient_accumulation_steps" in settings:
        raise SettingsError(
            f"A batch of {batch} cannot be made up of {processes} process(es) with per_device_train_batch_size={each}.",
            "Choose sizes that divide it, and leave gradient_accumulation_steps out.",
        )
    return settings | {"per_device_train_batch_size": each, "gradient_accumulation_steps": steps}


def declared_rows(spec: object) -> int | None:
    """How many rows a recipe says that data has; None where it says nothing."""
    if isinstance(spec, Mapping):
        for key in ("sample", "rows", "count"):
            if spec.get(key) is not None:
                return int(spec[key])
    return len(spec) if hasattr(spec, "__len__") and not isinstance(spec, str | Mapping) else None


def _path(spec: Mapping[str, Any], name: str) -> str:
    if not isinstance(spec.get("path"), str):
        raise SettingsError(f"The data of {name} has neither path nor source.", "Give one of them.")
    return str(spec["path"])


def _split(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"split": spec["split"]} if spec.get("split") else {}


def _sampled(rows: Any, spec: Mapping[str, Any]) -> Any:
    wanted = spec.get("sample")
    if wanted is None or wanted >= len(rows):
        return rows
    return rows.select(sorted(random.Random(spec.get("seed", 0)).sample(range(len(rows)), wanted)))
