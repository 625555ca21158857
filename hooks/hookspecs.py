"""Every hook of this package. A plugin implements any of them; an implementation may leave out arguments.

The newest plugin is asked first and the built-in ones last, so a user's plugin wins over a built-in one.
"""
# mypy: disable-error-code="empty-body"

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .markers import hookspec

if TYPE_CHECKING:
    from pathlib import Path

    import typer
    from transformers import PreTrainedModel, ProcessorMixin

    from pivot_plugin.adapters.base import VisionAdapter
    from pivot_plugin.generation.makers import Maker

    from .types import Layout, ObjectivePreset, Probe, Result, RewardFunction, Run


@hookspec(firstresult=True)
def pivot_adapter(model: "PreTrainedModel") -> "VisionAdapter | None":
    """Return the adapter for this model's family, or None if it is not yours.

    Called once per run, before any weight is touched. The first answer that is not None wins, so return None, never
    False. An exception stops the run and names your distribution.

    Example:
        from pivot_plugin.adapters import VisionAdapter
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_adapter(model):
            return VisionAdapter(model, family="mine") if model.config.model_type == "mine" else None
    """


@hookspec(firstresult=True)
def pivot_model(source: object, processor: object, weights: bool) -> "tuple[PreTrainedModel, ProcessorMixin] | None":
    """Return a model of another repository as a transformers one, and its processor, or None if it is not yours.

    Called once for everything that is loaded: with a folder path or a Hub id, and with a loaded object whose class is
    not one of transformers' own. `processor` is what the user gave, a tokenizer or a processor, or None; where
    `weights` is False only the structure is wanted, and the model may stay on the meta device. Make the model around
    the same parameters, so that a loaded object is trained in place. The first answer that is not None wins; what
    nobody answers for is loaded by transformers' auto classes. Raise a ModelError for a checkpoint that is yours and
    cannot be read. What was trained goes back by `pivot_model_trained` (objects) and `pivot_write_model` (folders).

    Example:
        from transformers import AutoProcessor, LlavaForConditionalGeneration
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_model(source):
            if isinstance(source, str) and source.startswith("mine/"):
                folder = source.removeprefix("mine/")
                return LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    """


@hookspec
def pivot_model_trained(model: "PreTrainedModel") -> None:
    """Bring what was trained in a model back into the object of another repository that it was made of.

    Called once after a model has been trained in place, or an encoder was grafted into an object, with the model,
    whether `pivot_model` made it or not; leave alone what is not yours. Training may have replaced modules and moved
    weights, so that parameters which were shared when the model was made are shared no more. An exception stops the run
    and names your distribution, since the object would not be what was trained.

    Example:
        import torch
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_model_trained(model):
            origin = getattr(model, "made_of", None)
            if origin is not None:
                with torch.no_grad():
                    origin.visual.load_state_dict(model.get_encoder(modality="image").state_dict())
    """


@hookspec(firstresult=True)
def pivot_write_model(model: "PreTrainedModel", template: str, target: str | None, folder: "Path") -> "Path | None":
    """Write a model as a checkpoint of another repository's form, and return its folder, or None if it is not yours.

    Called where a model is wanted in the form of the checkpoint it came from: `template` is the folder or Hub id of
    that checkpoint, `target` what the user calls its form (None for whatever form that is), `folder` is to be written,
    as a whole or not at all. Raise a ModelError for a template that is yours and a model that does not fit it.

    Example:
        from safetensors.torch import save_file
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_write_model(model, template, folder):
            if template.startswith("mine/"):
                folder.mkdir(parents=True)
                tensors = {f"mine.{name}": tensor for name, tensor in model.state_dict().items()}
                save_file(tensors, folder / "mine.safetensors")
                return folder
    """


@hookspec(firstresult=True)
def pivot_preference_layout(columns: list[str], example: Mapping[str, object]) -> "Layout | None":
    """Return a function that turns one row of this layout into a pair in the normal form, or None.

    Called once per data set with its column names and its first row. The function you return gets one row (a mapping)
    and returns a mapping with `images` (a list), `prompt`, `chosen` and `rejected` (lists of messages). An exception
    stops loading and names your distribution.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_preference_layout(columns):
            if {"picture", "ask", "good", "bad"} <= set(columns):
                return lambda row: {"images": [row["picture"]], "prompt": row["ask"],
                                    "chosen": row["good"], "rejected": row["bad"]}
    """


@hookspec
def pivot_rewards() -> "Mapping[str, RewardFunction]":
    """Return reward functions by name, with TRL's signature.

    Called when rewards are looked up by name. A reward function is called as `f(prompts, completions, **columns)` with
    lists of equal length and returns a list of floats, None for a row it does not judge.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_rewards():
            return {"short": lambda prompts, completions, **columns: [-len(text) / 100 for text in completions]}
    """


@hookspec
def pivot_objectives() -> "Mapping[str, ObjectivePreset]":
    """Return objective presets by name: settings of `PivotConfig` that `objective="name"` stands for.

    Called when an objective is looked up by name. `loss_type` and `loss_weights` are TRL's, about a pair's two answers;
    `image_terms` and `image_weights` hold its pictures against each other.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_objectives():
            return {"mostly-dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}}
    """


@hookspec
def pivot_probes() -> "Mapping[str, Probe]":
    """Return probes by name: functions that examine an encoder.

    Called when probes are looked up by name. A probe is called as `probe(subject, data, **options)`: the subject is a
    `pivot_plugin.probes.Subject` (an encoder, or an MLLM with one), of which `pivot_plugin.probes.features(subject,
    images)` gives frozen features, data and options are what the user gave. It returns a `ProbeResult`, or a mapping
    of names to numbers, the main one first.

    Example:
        from pivot_plugin.hooks import hookimpl
        from pivot_plugin.probes import features

        def spread(subject, images):
            return {"std": float(features(subject, images, pool="mean").pooled().std())}

        @hookimpl
        def pivot_probes():
            return {"spread": spread}
    """


@hookspec
def pivot_makers() -> "Mapping[str, Maker]":
    """Return makers by name: what turns a picture into a question with a known answer, or into a rejected picture.

    Called when makers are looked up by name. A maker of questions is called as `questions(draw)`, a maker of rejected
    pictures as `rejected(draw)`: `draw.picture` is the picture, `draw.difficulty`, `draw.random` and
    `draw.balanced(options)` are what else the task may depend on, so that it can be made again. Say by `edited` and
    the edits in `pivot_plugin.data.edits` what is to be done to a picture: it is rendered when it is needed. Raise
    `Unsuitable` for a picture of which nothing can be made; another is taken.

    Example:
        from pivot_plugin.data.edits import fill, mirror
        from pivot_plugin.generation.makers import Maker, Question
        from pivot_plugin.hooks import hookimpl

        def upside(draw):
            answer = draw.balanced(["yes", "no"])
            edits = [mirror("upside-down")] if answer == "yes" else []
            wrong = ["no" if answer == "yes" else "yes"]
            return Question([draw.picture.edited(*edits)], "Is this picture upside down?", answer, wrong)

        def half(draw):
            return draw.picture.edited(fill([0, 0, 0.5, 1]))

        @hookimpl
        def pivot_makers():
            return {"upside": Maker("upside", "ours", questions=upside), "half": Maker("half", "ours", rejected=half)}
    """


@hookspec
def pivot_sources() -> "Mapping[str, Callable[..., object]]":
    """Return makers of what a recipe needs, by name: data, encoders, language models.

    Called when a recipe names {source: name, ...}; the other keys are the maker's arguments. A maker of an encoder or a
    language model is given `seed`, and returns the model, or it and its image processor or tokenizer. A maker of data
    returns what `pivot.align`, `pivot.instruct`, `pivot.optimize` or the probe takes.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_sources():
            return {"my-captions": lambda count: [{"image": f"{n}.png", "caption": "a cat"} for n in range(count)]}
    """


@hookspec
def pivot_run_started(run: "Run") -> None:
    """Called when a run is about to take its first step, with its settings and folder.

    All plugins are called; one that raises is named in a warning and does not stop the run.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_run_started(run):
            print("training", run.family, "in", run.output_dir)
    """


@hookspec
def pivot_run_finished(result: "Result") -> None:
    """Called with the `PivotResult` of a finished run, after everything is saved.

    All plugins are called; one that raises is named in a warning and does not lose the result.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_run_finished(result):
            print("preference accuracy", result.metrics.get("after"))
    """


@hookspec
def pivot_card_sections(result: "Result") -> str | None:
    """Return markdown to be added to the model card, or None.

    Called when a card is written. Sections are added in the order of registration; one that raises is named in a
    warning and left out.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_card_sections(result):
            return "## Hardware\\n\\nTrained on one workstation."
    """


@hookspec
def pivot_commands(cli: "typer.Typer") -> None:
    """Add subcommands to the `pivot` command.

    Called when the command line starts with a command that is not built in. Plugins may take seconds to import, so
    `pivot --help` and the built-in commands load none: help lists the built-in commands alone, and `pivot adapters` the
    plugins; say in your documentation what your command is called. All plugins are called; one that raises is named on
    standard error.

    Example:
        from pivot_plugin.hooks import hookimpl

        @hookimpl
        def pivot_commands(cli):
            cli.command("hello")(lambda: print("hello"))
    """
