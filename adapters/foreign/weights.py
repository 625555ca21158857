"""Tensors of a repository's model under its own names: in the shards of a folder, or in a loaded object."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn

from pivot_plugin.errors import ModelError

CONFIG = "config.json"
NAMED = 6
# of a Hub repository; its code is left where it is
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")

Reader = Callable[[str], torch.Tensor]


class Weights(Protocol):
    """Tensors by name, wherever they lie.

    Attributes:
        label: what they are of, in words, for errors.
        config: settings of the model, as its config.json has them.
    """

    label: str
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path | None:
        """Where its tokenizer lies, None where that is not known."""
        ...

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in order."""
        ...

    def reading(self) -> AbstractContextManager[Reader]:
        """A context that gives a function from names to tensors."""
        ...


class FolderWeights:
    """The weights of a checkpoint folder: safetensors, or PyTorch files that are read without running code.

    Args:
        folder: with config.json.
        config: its content.
        label: as the user named it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], label: str) -> None:
        self._folder = folder
        self.config = config
        self.label = label

    @property
    def folder(self) -> Path | None:
        return self._folder

    @cached_property
    def _file_of(self) -> dict[str, str]:
        """The file of each tensor.

        Raises:
            ModelError: for missing or unreadable files.
        """
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self._folder / index).is_file():
                return self._indexed(index)
        files = sorted(self._folder.glob("*.safetensors")) or sorted(self._folder.glob("pytorch_model*.bin"))
        if not files:
            raise ModelError(
                f"{self.label!r} has a {CONFIG} and no weights: neither *.safetensors nor pytorch_model*.bin.",
                "Download the checkpoint whole.",
            )
        if len(files) > 1:
            raise ModelError(
                f"{self.label!r} has {len(files)} weight files ({some([file.name for file in files])}) and no index "
                "that says which tensors they should hold.",
                "Download model.safetensors.index.json too.",
            )
        names: dict[str, str] = {}
        with self._open(files[0].name) as tensors:
            names.update(dict.fromkeys(tensors.keys(), files[0].name))
        return names

    def _indexed(self, index: str) -> dict[str, str]:
        try:
            files: dict[str, str] = json.loads((self._folder / index).read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{index} of {self.label!r} cannot be read: {type(error).__name__}: {error}.", "Download it again."
            ) from error
        return files

    def check_whole(self) -> None:
        """Make sure that every file the index names is there.

        Raises:
            ModelError: naming those that are not.
        """
        wanted = sorted(set(self._file_of.values()))
        missing_files = [name for name in wanted if not (self._folder / name).is_file()]
        if missing_files:
            raise ModelError(
                f"{self.label!r} is half downloaded: {len(missing_files)} of the {len(wanted)} weight files its "
                f"index names are missing: {some(missing_files)}.",
                "Download it again: an interrupted download goes on where it stopped.",
            )

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        self.check_whole()
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def get(name: str) -> torch.Tensor:
                file = self._file_of[name]
                if file not in opened:
                    opened[file] = stack.enter_context(self._open(file))
                try:
                    return opened[file].get_tensor(name)
                except (KeyError, SafetensorError) as error:
                    raise ModelError(
                        f"{file} of {self.label!r} has no tensor {name!r}, which the index says it has.",
                        "Download this file again.",
                    ) from error

            yield get

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self._folder / file
        try:
            if file.endswith(".safetensors"):
                opened: Any = safe_open(path, framework="pt")
            else:
                # only tensors are unpickled, no code of whoever wrote the file
                opened = _Loaded(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:
            raise ModelError(
                f"{file} of {self.label!r} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}.",
                "Download this file again; a file that was cut short cannot be used.",
            ) from error
        with opened as tensors:
            yield tensors


class _Loaded:
    """A dictionary of tensors with the methods of an opened safetensors file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> "_Loaded":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class ObjectWeights:
    """The parameters of a loaded object, themselves and no copies.

    Args:
        model: of a repository's class.
        config: its settings.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.model = model
        self.config = config
        self.label = type(model).__name__

    @cached_property
    def folder(self) -> Path | None:
        """The folder or the Hub repository that the object was loaded from."""
        name = str(self.config.get("_name_or_path") or "")
        if not name or Path(name).is_dir():
            return Path(name) if name and (Path(name) / CONFIG).is_file() else None
        try:
            return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
        except (OSError, ValueError, HfHubHTTPError):
            return None

    @cached_property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict(keep_vars=True))

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        yield self._parameters.__getitem__


def configuration(source: str | Path) -> dict[str, Any] | None:
    """config.json of a folder or a Hub id as it stands there, None where there is none.

    Args:
        source: folder or Hub id.
    """
    path = Path(source) / CONFIG
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), CONFIG))
        except (OSError, ValueError, HfHubHTTPError):
            return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def checkpoint(source: str | Path, config: Mapping[str, Any], weights: bool) -> FolderWeights:
    """The checkpoint at a folder or Hub id, downloaded where it is not here.

    Args:
        source: folder or Hub id.
        config: its configuration.
        weights: whether the weights are wanted; without them an index of their names will do.

    Raises:
        ModelError: if it cannot be downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=list(SMALL_FILES)))
            if weights or not (folder / "model.safetensors.index.json").is_file():
                folder = Path(snapshot_download(str(source), allow_patterns=[*SMALL_FILES, "*.safetensors"]))
                if not any(folder.glob("*.safetensors")):
                    folder = Path(snapshot_download(str(source), allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ModelError(
                f"The checkpoint {str(source)!r} could not be downloaded: {type(error).__name__}: {error}.",
                "Check the id and the connection, or give a local folder.",
            ) from error
    return FolderWeights(folder, config, str(source))


def some(names: list[str]) -> str:
    """The first few of many names, as a text."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
