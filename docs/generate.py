"""The pages of the site that come from the code: run by mkdocs-gen-files while the site is built.

Objectives, probes, rewards and hooks are pages of their docstrings, so that what is registered is documented and
nothing else; commands come from the command line's own definitions, errors from the places that raise them, stacks and
benchmarks from the files that tests and measurements keep.
"""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml

from pivot_plugin import objectives
from pivot_plugin.cli.app import cli
from pivot_plugin.generation.makers import Maker, makers
from pivot_plugin.hooks import hookspecs
from pivot_plugin.probes import lookup as probe_lookup
from pivot_plugin.rewards import lookup as reward_lookup

ROOT = Path(__file__).parents[1]
SECTION = re.compile(
    r"^(Args|Returns|Raises|Source|When|Relations|Example|Yields|Attributes|Notes?):(.*)", re.MULTILINE
)
# pages written by hand, as they follow one another
HOW_TO = (
    "pairs",
    "own-answers",
    "rollouts",
    "pictures",
    "audit",
    "train",
    "measure",
    "publish",
    "stacks",
    "assemble",
    "recipes",
)
HOW_TO_WIDE = ("several-gpus", "own-adapter")
REFERENCE: Mapping[str, tuple[str, ...]] = {
    "pivot_plugin": (),
    "preferences": ("pivot_plugin.preferences",),
    "probes": ("pivot_plugin.probes",),
    "encoders": ("pivot_plugin.encoders",),
    "recipes": ("pivot_plugin.recipes",),
    "rewards": ("pivot_plugin.rewards",),
    "settings": ("pivot_plugin.config",),
    "adapters": ("pivot_plugin.adapters.base",),
    "hooks": ("pivot_plugin.hooks", "pivot_plugin.hooks.types"),
    "testing": ("pivot_plugin.testing",),
    "errors": ("pivot_plugin.errors",),
}


def write(path: str, text: str) -> None:
    """One page of the site."""
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text.rstrip() + "\n")


def parts_of(docstring: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and its sections by name."""
    text = inspect.cleandoc(docstring)
    heads = list(SECTION.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)][: len(heads)]
    sections = {
        head[1]: inspect.cleandoc(f"{head[2].strip()}\n{text[head.end() : end]}").strip()
        for head, end in zip(heads, ends, strict=True)
    }
    return text[: heads[0].start()].strip() if heads else text, sections


def as_list(section: str) -> str:
    """A docstring's list of arguments in Markdown; continued lines belong to the entry above."""
    entries = re.split(r"\n(?=\S)", inspect.cleandoc(section))
    lines = []
    for entry in entries:
        name, _, what = " ".join(entry.split()).partition(": ")
        lines.append(f"* `{name}`: {what}" if what else f"* {name}")
    return "\n".join(lines)


def in_a_line(section: str) -> str:
    """A section that is a paragraph."""
    return " ".join(section.split())


def signature_of(function: Callable[..., object]) -> str:
    """The signature as one writes it, a line for each parameter."""
    parameters = list(inspect.signature(function).parameters.values())
    lines, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        lines.append(f"    {parameter},")
    return "\n".join([f"{function.__name__}(", *lines, ")"])


def of_function(title: str, function: Callable[..., object], more: str = "") -> str:
    """A page about a function: what it is, its signature, arguments, source."""
    idea, sections = parts_of(function.__doc__ or "")
    body = [f"# {title}", idea, more]
    body.append(f"```python\n{signature_of(function)}\n```")
    for name in ("Args", "Returns", "Raises"):
        if name in sections:
            is_list = name in ("Args", "Raises") or re.match(r"[\w, ]+: ", sections[name])
            body.append(f"**{name}**\n\n{as_list(sections[name]) if is_list else sections[name]}")
    for name in ("When", "Notes", "Note", "Source"):
        if name in sections:
            body.append(f"**{name}.** {in_a_line(sections[name])}")
    return "\n\n".join(part for part in body if part)


def objective_page(name: str, preset: Callable[[], Mapping[str, Any]]) -> str:
    """A page about an objective: idea, equation, when, settings, source, a command."""
    idea, sections = parts_of(preset.__doc__ or "")
    settings = dict(preset())
    trainer = settings.pop("trainer", "dpo")
    written = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None).strip()
    rates = {kind: objectives.learning_rate(name, lora) for kind, lora in (("LoRA", True), ("weights", False))}
    example = (
        f'pivot.optimize(model, questions, objective="{name}", rewards=["accuracy"], processor=processor)'
        if name in objectives.ONLINE
        else f'pivot.optimize(model, prefs, objective="{name}", processor=processor)'
    )
    body = [
        f"# {name}",
        idea,
        *(f"**{part}.** {in_a_line(sections[part])}" for part in ("When", "Relations") if part in sections),
        f"```python\n{example}\n```",
        f"**Settings of TRL's {trainer.upper()}Config**\n\n```yaml\n{written}\n```" if settings else "",
        f"**Default learning rate.** {rates['LoRA']:g} for LoRA, {rates['weights']:g} where weights train themselves.",
        f"**Source.** {in_a_line(sections.get('Source', ''))}",
        "Measured beside the others: [which pairs, which loss](../which-pairs.md) and [the tables](../benchmarks.md).",
    ]
    return "\n\n".join(part for part in body if part)


def maker_page(name: str, maker: Maker) -> str:
    """A page about a maker: what it makes, of what, how hard, source, a command."""
    function = maker.questions or maker.rejected
    idea, sections = parts_of(function.__doc__ or "")
    lowest, highest = maker.difficulty
    example = (
        f'pivot.optimize(model, "./photos", make="{name}", difficulty=0.5, objective="grpo", processor=processor)'
        if maker.questions
        else f'pivot.optimize(model, prefs, objective="mdpo", rejected_images="{name}", processor=processor)'
    )
    needs = [f"{maker.pictures} picture(s) or more", f"a difficulty from {lowest:g} (easy) to {highest:g} (hard)"]
    needs += ["captions"] if maker.needs_caption else []
    body = [
        f"# {name}",
        "Makes questions whose answers are known." if maker.questions else "Makes rejected pictures.",
        idea,
        f"**Needs** {', '.join(needs)}.",
        f"```python\n{example}\n```",
        f"**Source.** {maker.source}.",
        "What is measured of makers: [the tables](../benchmarks.md#questions-made-of-pictures). One of your own comes "
        "by the hook [pivot_makers](../hooks/pivot_makers.md).",
        in_a_line(sections.get("Source", "")),
    ]
    return "\n\n".join(part for part in body if part)


def hook_page(name: str, hook: Callable[..., object]) -> str:
    """A page about a hook: its contract and its example, which a test runs."""
    idea, sections = parts_of(hook.__doc__ or "")
    arguments = ", ".join(inspect.signature(hook).parameters)
    example = f"```python\n{sections['Example']}\n```" if "Example" in sections else ""
    return "\n\n".join([f"# {name}", f"`{name}({arguments})`", idea, "**Example**, run by the tests:", example])


def first_sentence(text: str) -> str:
    """What a docstring's first line says."""
    return inspect.cleandoc(text).splitlines()[0]


def listing(title: str, intro: str, entries: Mapping[str, str]) -> str:
    """The first page of a group: a table of its pages with what each is in one line."""
    rows = [f"| [{name}]({name}.md) | {what.replace('|', '&#124;')} |" for name, what in entries.items()]
    return "\n".join([f"# {title}", "", intro, "", "| | |", "|---|---|", *rows])


def group(folder: str, title: str, intro: str, pages: Mapping[str, tuple[str, str]]) -> list[str]:
    """A folder of pages and its first page; returns the lines of its navigation."""
    for name, (_, page) in pages.items():
        write(f"{folder}/{name}.md", page)
    write(f"{folder}/index.md", listing(title, intro, {name: what for name, (what, _) in pages.items()}))
    return [f"* [{title}]({folder}/index.md)", *(f"    * [{name}]({folder}/{name}.md)" for name in pages)]


def rewards_page() -> str:
    """Every reward by name."""
    parts = ["# Rewards", "Scores of an answer by name, in every place that takes `rewards=` or `--reward`."]
    for name, function in reward_lookup.BUILT_IN.items():
        idea, sections = parts_of(function.__doc__ or "")
        parts.append(f"## {name}\n\n{idea}")
        if "Source" in sections:
            parts.append(f"**Source.** {in_a_line(sections['Source'])}")
    parts.append("One of your own is a function with TRL's signature; one by name comes from the hook")
    return "\n\n".join(parts) + " [pivot_rewards](hooks/pivot_rewards.md)."


def commands_page() -> str:
    """Every command with its arguments and options, from what the command line itself is made of."""
    from typer.main import get_command

    parts = [
        "# Commands",
        "`pivot COMMAND --help` says the same. Exit status: 0 done, 1 refused or failed with a sentence,",
    ]
    parts[-1] += " 2 a word that is no command or option, 130 interrupted."

    def name_of(argument: Any) -> str:
        return str(argument.metavar or argument.name.upper())

    def page_of(command: Any, words: str, level: int) -> None:
        parts.append(f"{'#' * level} {words}")
        if command.help:
            parts.append(inspect.cleandoc(command.help))
        if hasattr(command, "commands"):
            for name, sub in command.commands.items():
                if not sub.hidden:
                    page_of(sub, f"{words} {name}", level + 1)
            return
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(name_of(one) if one.required else f"[{name_of(one)}]" for one in arguments)
        parts.append(f"```\n{words} {usage} [OPTIONS]\n```")
        rows = []
        for one in command.params:
            if getattr(one, "hidden", False) or one.name == "help":
                continue
            spelled = ", ".join(one.opts) if one.param_type_name == "option" else name_of(one)
            is_said = (
                one.default is not None and not callable(one.default) and one.default not in ((), [], False, "", ...)
            )
            default = f" Default: `{one.default}`." if is_said and not one.required else ""
            said = " ".join((getattr(one, "help", None) or "").split()).replace("|", "&#124;").replace("<", "&lt;")
            rows.append(f"| `{spelled}` | {said}{default} |")
        if rows:
            parts.append("\n".join(["| | |", "|---|---|", *rows]))

    root = get_command(cli)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        page_of(command, f"pivot {name}", 2)
    return "\n\n".join(parts)


def errors_raised() -> Iterator[tuple[str, str, str, str]]:
    """Every error that is raised with its own words: class, module, finding, remedy; `...` stands for what is named."""
    from pivot_plugin import errors

    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.PivotError)
    }
    for file in sorted(
        [*ROOT.glob("pivot_plugin/**/*.py"), *ROOT.glob("adapters/**/*.py"), *ROOT.glob("hooks/**/*.py")]
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes):
                continue
            said = [words_of(argument) for argument in node.args[:2]]
            if said and said[0].replace("...", "").strip(" .:,"):
                yield node.func.id, file.relative_to(ROOT).as_posix(), said[0], said[1] if len(said) > 1 else ""


def words_of(node: ast.expr) -> str:
    """The text of a string expression, with `...` for what is only known when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words_of(node.left) + words_of(node.right)
    if isinstance(node, ast.BoolOp):
        return words_of(node.values[-1])
    if isinstance(node, ast.IfExp):
        return words_of(node.body)
    return "..."


def errors_page() -> str:
    """Every error with its remedy, by class and room."""
    from pivot_plugin import errors

    by_class: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for kind, file, finding, remedy in errors_raised():
        by_class[kind].append((file, finding, remedy))
    parts = [
        "# Errors and their remedies",
        "Everything that is raised on purpose is a `PivotError`: what was found, then what to do. `...` stands for "
        "what is named. On the command line it is one sentence and exit status 1; `PIVOT_TRACEBACK=1` shows where it "
        "comes from.",
    ]
    for kind, raised in by_class.items():
        parts.append(f"## {kind}\n\n{first_sentence(getattr(errors, kind).__doc__ or '')}")
        rows = [f"| {cell(finding)} | {cell(remedy)} |" for _, finding, remedy in sorted(set(raised))]
        parts.append("\n".join(["| found | what to do |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def cell(text: str) -> str:
    """Text that stands in a cell of a table, as it is."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"([*_`\[\]{}])", r"\\\1", escaped)


def elsewhere(text: str, page: str) -> str:
    """A file of the repository as a page: links to files that are no pages become plain words."""
    targets = {
        "benchmarks/README.md": "benchmarks.md",
        "README.md": "index.md",
        "CONTRIBUTING.md": "contributing.md",
        "SECURITY.md": "security.md",
        "CHANGELOG.md": "changelog.md",
    }
    here = Path(page).parent

    def moved(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not path:
            return match[0]
        name = Path(path).name
        inside = targets.get(path.removeprefix("../"))
        if inside is None and page.startswith("stacks/") and path.endswith(".md") and "/" not in path:
            inside = f"stacks/{'index.md' if name == 'README.md' else name}"
        if inside is None:
            return words if words.startswith("`") else f"`{words}`" if "/" in words else words
        up = "../" * len(here.parts)
        return f"[{words}]({up}{inside}{'#' + anchor if anchor else ''})"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", moved, text)


def reference_pages() -> list[str]:
    """The public names, from their docstrings, each on the first page that has it."""
    import pivot_plugin

    lines: list[str] = []
    home: dict[str, str] = {}
    for name, modules in REFERENCE.items():
        wanted = [f"{getattr(pivot_plugin, public).__module__}.{public}" for public in pivot_plugin.__all__]
        if modules:
            wanted = [member for module in modules for member in members_of(module)]
        here = [path for path in dict.fromkeys(wanted) if home.setdefault(path, name) == name]
        moved = [f"[{path.rpartition('.')[2]}][{path}]" for path in wanted if path not in here]
        also = f"Documented [before](pivot_plugin.md): {', '.join(moved)}." if moved else ""
        write(f"reference/{name}.md", "\n\n".join([f"# {name}", also, *(f"::: {path}" for path in here)]))
        lines.append(f"    * [{name}](reference/{name}.md)")
    return lines


def members_of(module: str) -> list[str]:
    """Where the public names of a module are defined."""
    from importlib import import_module

    loaded = import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(loaded).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module and callable(value)
        ]
    paths = []
    for name in names:
        value = getattr(loaded, name)
        home = getattr(value, "__module__", None)
        if isinstance(value, type) or inspect.isfunction(value):
            paths.append(f"{home}.{name}")
    return paths


def main() -> None:
    """Write every generated page and the navigation."""
    objectives_nav = group(
        "objectives",
        "Objectives",
        "What `objective=` and `--objective` take; any loss type of TRL is one too, and a list of them with "
        "`loss_weights=`.",
        {
            name: (first_sentence(preset.__doc__ or ""), objective_page(name, preset))
            for name, preset in objectives.BUILT_IN.items()
        },
    )
    probes_nav = group(
        "probes",
        "Probes",
        "What a frozen encoder's features make easy to tell, where a loss looks, and what else training changes. Each "
        "is run by `pivot.compare`, during training by `optimize(probes=...)`, and by itself.",
        {
            name: (first_sentence(probe.__doc__ or ""), of_function(name, probe))
            for name, probe in probe_lookup.pivot_probes().items()
        },
    )
    makers_nav = group(
        "makers",
        "Makers",
        "What `make=` and `--make` take, and what `rejected_images=` takes: pictures are changed so that the right "
        "answer, or the better picture, is known. [How to](../how-to/pictures.md).",
        {
            name: (first_sentence((maker.questions or maker.rejected).__doc__ or ""), maker_page(name, maker))
            for name, maker in makers().items()
        },
    )
    hooks = {
        name: value
        for name, value in vars(hookspecs).items()
        if name.startswith("pivot_") and inspect.isfunction(value)
    }
    hooks_nav = group(
        "hooks",
        "Hooks",
        "What a plugin can add, by pluggy, from a distribution of its own with the entry point group `pivot_plugin`: "
        "[a family of your own](../how-to/own-adapter.md) shows a complete one.",
        {name: (first_sentence(hook.__doc__ or ""), hook_page(name, hook)) for name, hook in hooks.items()},
    )
    stacks = sorted(path.stem for path in (ROOT / "examples/stacks").glob("*.md") if path.stem != "README")
    for name in ("README", *stacks):
        text = (ROOT / f"examples/stacks/{name}.md").read_text(encoding="utf-8")
        page = f"stacks/{'index' if name == 'README' else name}.md"
        write(page, elsewhere(text, page))
    stacks_nav = ["* [With your stack](stacks/index.md)", *(f"    * [{name}](stacks/{name}.md)" for name in stacks)]
    for file, page in (
        ("benchmarks/README.md", "benchmarks.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("SECURITY.md", "security.md"),
        ("CHANGELOG.md", "changelog.md"),
    ):
        write(page, elsewhere((ROOT / file).read_text(encoding="utf-8"), page))
    write("rewards.md", rewards_page())
    write("commands.md", commands_page())
    write("errors.md", errors_page())
    reference_nav = reference_pages()

    def title_of(page: str) -> str:
        return (ROOT / f"docs/how-to/{page}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")

    how_to = [f"    * [{title_of(page)}](how-to/{page}.md)" for page in (*HOW_TO, *HOW_TO_WIDE)]
    write(
        "SUMMARY.md",
        "\n".join(
            [
                "* [pivot-plugin](index.md)",
                "* [Tutorial](tutorial.md)",
                "* How to",
                *how_to,
                *stacks_nav,
                "* [Which pairs, which loss](which-pairs.md)",
                *objectives_nav,
                *probes_nav,
                *makers_nav,
                "* [Rewards](rewards.md)",
                "* [Families](families.md)",
                "* [How it works](how-it-works.md)",
                "* [Speed and other measurements](benchmarks.md)",
                *hooks_nav,
                "* [Commands](commands.md)",
                "* Reference",
                *reference_nav,
                "* [Errors](errors.md)",
                "* [Security](security.md)",
                "* [Contributing](contributing.md)",
                "* [Changes](changelog.md)",
            ]
        ),
    )


main()
