"""What can be refused before torch is imported: names of options, values that cannot be, paths at which nothing is.

The fields of a configuration are read off the source of its class, without importing it: what TRL and transformers
have is known in a tenth of a second instead of six. Whatever cannot be told so is left to the run, which asks again,
with the same words.
"""

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pivot_plugin.errors import DataError, ModelError, SettingsError, unknown
from pivot_plugin.extras import check_trackers
from pivot_plugin.files import is_path
from pivot_plugin.typed import fits, shown, wanted

ONLINE = ("grpo", "rloo")
HERE = Path(__file__).parents[1]
# where a configuration's fields are declared: a package, and files in it
TRAINING_ARGUMENTS = (("transformers", "training_args.py"), ("trl", "trainer/base_config.py"))
OF_TRL = {
    "grpo": ("trl", "trainer/grpo_config.py"),
    "rloo": ("trl", "trainer/rloo_config.py"),
    "pairs": ("trl", "trainer/dpo_config.py"),
    "instruct": ("trl", "trainer/sft_config.py"),
}
OURS = {
    "grpo": ("TowerConfig", "RolloutConfig"),
    "rloo": ("TowerConfig", "RolloutConfig"),
    "pairs": ("TowerConfig", "PivotConfig"),
    "instruct": ("TowerConfig", "InstructConfig"),
}
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".zip")
PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "None": None}


def check_settings(settings: Mapping[str, Any], kind: str, own_answers: bool, verb: str) -> None:
    """Refuse options that no configuration has, and values of another type than a plain one.

    Args:
        settings: by name.
        kind: of the run: "pairs", "grpo", "rloo" or "instruct".
        own_answers: whether the options of own answers are options, too.
        verb: what has no such option, as the beginning of a sentence.

    Raises:
        SettingsError: as the run itself would.
    """
    known = fields_of(kind)
    if not known:
        return
    if own_answers:
        known = known | _declared(HERE / "generation" / "own_answers.py", ("OwnAnswers",))
    for name, value in settings.items():
        if name not in known:
            raise unknown("option", name, known, f"{verb} has no option {name!r}.")
        if (expected := known[name]) is not Any and not fits(value, expected):
            raise SettingsError(f"{name} is {shown(value)}.", f"Give {wanted(expected)}.")
    check_trackers(settings.get("report_to"))


def check_objective(objective: str) -> None:
    """Refuse an objective that neither this package, nor TRL, nor a plugin can have.

    Raises:
        SettingsError: with the nearest ones.
    """
    if any(True for _ in entry_points(group="pivot_plugin")):
        # a plugin may know it
        return
    ours = _functions_in(HERE / "objectives.py", "BUILT_IN")
    of_trl = _loss_types()
    if ours and of_trl and objective not in (*ours, *of_trl):
        raise unknown("objective", objective, [*ours, *of_trl])


def check_model(name: str) -> None:
    """Refuse the path of a model at which nothing is.

    Raises:
        ModelError: naming it.
    """
    if is_path(name) and not Path(name).expanduser().exists():
        raise ModelError(f"There is no folder {name!r}.", "Mend the path; a Hub id is owner/name.")


def check_data(name: str | None) -> None:
    """Refuse the path of data at which nothing is.

    Raises:
        DataError: naming it.
    """
    if name is None or Path(name).expanduser().exists():
        return
    if is_path(name) or Path(name).suffix in DATA_SUFFIXES:
        raise DataError(f"{name!r} cannot be read: no such file or folder.", "Mend the path; a Hub id is owner/name.")


@cache
def fields_of(kind: str) -> dict[str, Any]:
    """Fields of a run's configuration and the types of those that are plain, `Any` for others; empty if unreadable.

    Args:
        kind: as for `check_settings`.
    """
    known: dict[str, Any] = {}
    for package, file in (*TRAINING_ARGUMENTS, OF_TRL[kind]):
        spec = find_spec(package)
        path = Path(next(iter(spec.submodule_search_locations or []), "")) / file if spec else Path(file)
        if not path.is_file():
            return {}
        known |= _declared(path, None)
    return known | _declared(HERE / "config.py", OURS[kind])


def _declared(path: Path, classes: Iterable[str] | None) -> dict[str, Any]:
    """Annotated names in the bodies of classes, all of a file's where None."""
    wanted_classes = None if classes is None else set(classes)
    return {
        line.target.id: _plain(line.annotation)
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef) and (wanted_classes is None or node.name in wanted_classes)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_")
    }


def _plain(annotation: ast.expr) -> Any:
    """A type made of plain ones, `Any` for another."""
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return type(None)
    if isinstance(annotation, ast.Name) and annotation.id in PLAIN:
        return PLAIN[annotation.id]
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        left, right = _plain(annotation.left), _plain(annotation.right)
        return Any if Any in (left, right) else left | right
    return Any


def _functions_in(path: Path, name: str) -> list[str]:
    """Names that a comprehension over a tuple assigns to a module's variable."""
    for node in _tree(path).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return [
                item.id
                for part in ast.walk(node.value or node)
                if isinstance(part, ast.Tuple)
                for item in part.elts
                if isinstance(item, ast.Name)
            ]
    return []


def _loss_types() -> list[str]:
    """TRL's loss types, as the help of its configuration names them."""
    spec = find_spec("trl")
    path = Path(next(iter(spec.submodule_search_locations or []), "")) / OF_TRL["pairs"][1] if spec else Path()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "loss_type":
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            long = max((text for text in texts if isinstance(text, str)), key=len, default="")
            return [part for part in long.split("'")[1::2] if part.isidentifier()]
    return []


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])
