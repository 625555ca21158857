"""The way back: a model in transformers' form, written as a folder of the repository's form."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from transformers import PreTrainedModel

from pivot_plugin.errors import ModelError
from pivot_plugin.files import whole_folder

from .building import Plan
from .names import NameTable
from .reading import plan_for
from .weights import CONFIG, FolderWeights, some

# the checkpoint's own beside its weights and configuration
KEPT_FILES = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "pre*.json",
    "generation_config.json",
)


def their_tensors(
    model: PreTrainedModel, table: NameTable, like: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors under a repository's names, fused where it fuses them. None is left out but tied ones.

    Args:
        model: in transformers' form.
        table: of the repository's names.
        like: names to prefer where the table has several for one tensor: those of the checkpoint it was read from.

    Raises:
        ModelError: naming tensors that the repository has no place for, or places that nothing fills.
    """
    state = model.state_dict()
    preferred = [table.by_theirs(name) for name in like if not table.is_computed(name)]
    bindings = {binding.theirs: binding for binding in preferred if binding is not None}
    placed = {name for binding in bindings.values() for name in binding.ours}
    others = {name: table.by_ours(name) for name in state if name not in placed | model.all_tied_weights_keys.keys()}
    if homeless := [name for name, binding in others.items() if binding is None]:
        raise ModelError(
            f"{len(homeless)} tensors of {type(model).__name__} have no place in the repository's form: "
            f"{some(homeless)}.",
            "Export to another form.",
        )
    bindings |= {binding.theirs: binding for binding in others.values() if binding is not None}
    for theirs, binding in bindings.items():
        if missing := [name for name in binding.ours if name not in state]:
            raise ModelError(
                f"{type(model).__name__} lacks {some(missing)}, which {theirs} of the repository's form holds.",
                "Write back a model of the kind that was read from this checkpoint.",
            )
        yield theirs, binding.cut.whole([state[name] for name in binding.ours])


def write_back(model: PreTrainedModel, template: str | Path, folder: str | Path) -> Path:
    """Write a model into a folder of the form of the checkpoint it was read from.

    Configuration, tokenizer, code and names are the checkpoint's; the numbers are the model's, in its precision.

    Args:
        model: in transformers' form, read from a checkpoint of this form, and trained since.
        template: folder or Hub id of that checkpoint, whose configuration and tensor names are kept.
        folder: to be written, as a whole or not at all.

    Raises:
        ModelError: if the template is of no known layout, or the model does not fit it.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{str(target)!r} exists and is no empty folder.", "Choose another folder, or empty it.")
    weights, plan = plan_for(template)
    _refuse_another_kind(model, plan, weights.label)
    tensors = dict(their_tensors(model, plan.table, weights.names))
    with weights.reading() as get:
        template_names = set(weights.names)
        wrong_shapes = [
            f"{name} has shape {tuple(tensor.shape)} instead of {tuple(get(name).shape)}"
            for name, tensor in tensors.items()
            if name in template_names and tensor.shape != get(name).shape
        ]
        if wrong_shapes:
            raise ModelError(
                f"The model does not fit the form of {weights.label!r}: {len(wrong_shapes)} tensors differ: "
                f"{some(wrong_shapes)}.",
                "Write back a model of the same sizes.",
            )
        tensors |= {name: get(name) for name in weights.names if plan.table.is_computed(name)}
    with whole_folder(target) as written:
        for pattern in KEPT_FILES:
            for file in _kept_folder(weights).glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, written / file.name)
        # split and indexed as transformers does
        save_torch_state_dict(_alone(tensors), written, metadata={"format": "pt"})
        _write_configuration(written / CONFIG, weights.config, {**plan.back, "dtype": model.dtype})
    return target


def _refuse_another_kind(model: PreTrainedModel, plan: Plan, label: str) -> None:
    """Refuse a model that its checkpoint was not read as, of which some tensors might fit all the same.

    Raises:
        ModelError: if it is of another class.
    """
    if type(model) is not plan.model_class:
        raise ModelError(
            f"{label!r} is read as a {plan.model_class.__name__}; this is a {type(model).__name__}.",
            "Give the checkpoint that the model was read from.",
        )


def _kept_folder(weights: FolderWeights) -> Path:
    """The checkpoint's folder, with its code where it comes from the Hub: copied, never run."""
    folder = weights.folder
    if not Path(weights.label).is_dir():
        folder = Path(snapshot_download(weights.label, allow_patterns=list(KEPT_FILES)))
    assert folder is not None
    return folder


def _alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the host, each in memory of its own: of several that share it only one would be written."""
    taken: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        on_host = tensor.detach().to("cpu").contiguous()
        memory = on_host.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != on_host.nbytes:
            on_host = on_host.clone()
        taken.add(memory.data_ptr())
        alone[name] = on_host
    return alone


def _write_configuration(path: Path, config: Mapping[str, Any], changed: dict[str, Any]) -> None:
    """The checkpoint's configuration, with what the weights beside it need; the precision under the name it uses."""
    precision = str(changed.pop("dtype")).removeprefix("torch.")
    name = "dtype" if "dtype" in config else "torch_dtype"
    written = {**config, **changed, name: precision}
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
