"""Commands about preference data: `pivot prefs check`, `build`, `make`, `audit`, `push`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pivot_plugin.choices import PairUp

from .options import Difficulty, ImageFolder, MadeCount, column, making_options, reward_weight, shares_of

group = typer.Typer(help="Check or audit preference pairs, or make them.", no_args_is_help=True)


@group.command("check")
def check(
    source: Annotated[str, typer.Argument(help="File, folder, zip or Hub id of pairs.")],
    processor: Annotated[str | None, typer.Option(help="Model whose processor counts the tokens.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="ours=theirs; repeat it.")] = None,
    image_folder: ImageFolder = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images given by address.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, every row number included.")
    ] = False,
) -> None:
    """Look at every pair and report every defect; exit status 1 when there are errors.

    pivot prefs check ./pairs --processor llava-hf/llava-1.5-7b-hf
    """
    theirs = dict(column(text) for text in columns or [])
    from pivot_plugin.data.checking import check as look

    report = look(
        source,
        _processor(processor),
        split=split,
        columns=theirs or None,
        image_folder=image_folder,
        allow_urls=allow_urls,
    )
    print(json.dumps(report.as_dict()) if as_json else report)
    if report.errors:
        raise typer.Exit(1)


@group.command("build")
def build(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the MLLM to sample from.")],
    questions: Annotated[str, typer.Argument(help="File, folder or Hub id of questions with answers.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the pairs.")],
    rewards: Annotated[list[str] | None, typer.Option("--reward", help="Name, or name=weight; repeat it.")] = None,
    pair_up: Annotated[PairUp, typer.Option(help="Which completions of a question make pairs.")] = "best-worst",
    margin: Annotated[float, typer.Option(help="Leave out pairs not further apart than this.")] = 0.0,
    n: Annotated[int, typer.Option("--n", help="Completions per question.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 8,
    instruction: Annotated[str | None, typer.Option(help="Put behind every question.")] = None,
    engine: Annotated[str | None, typer.Option(help="Address of a vLLM server.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the questions.")] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="ours=theirs; repeat it.")] = None,
    image_folder: ImageFolder = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn questions with answers into preference pairs from the model's own completions.

    Finished questions stay on disk; the same command goes on where it stopped.

    pivot prefs build my-model ./questions.jsonl -o pairs --reward accuracy --n 8
    """
    weighted = [reward_weight(text) for text in rewards or ["accuracy"]]
    theirs = dict(column(text) for text in columns or [])
    from pivot_plugin.data.questions import load_questions
    from pivot_plugin.data.storage import save
    from pivot_plugin.generation.ranking import rank
    from pivot_plugin.generation.sampling import sample
    from pivot_plugin.models.loading import load_model
    from pivot_plugin.rewards import resolve_rewards

    functions = resolve_rewards([name for name, _ in weighted])
    dataset = load_questions(questions, columns=theirs or None, image_folder=image_folder, split=split)
    mllm, processor = load_model(model)
    candidates = sample(
        mllm,
        dataset,
        processor=processor,
        n=n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        instruction=instruction,
        engine=engine,
        seed=seed,
        output_dir=output_dir / "candidates",
    )
    pairs = rank(candidates, functions, [weight for _, weight in weighted], pair_up=pair_up, margin=margin)
    judges = ", ".join(f"{name} (weight {weight:g})" for name, weight in weighted)
    how_built = (
        f"{n} completions per question were sampled at temperature {temperature:g} and paired by score "
        f"({pair_up}, margin {margin:g}). Rewards: {judges}. {len(dataset):,} questions gave {len(pairs):,} pairs."
    )
    report = save(pairs, output_dir / "pairs", how_built)
    if as_json:
        print(json.dumps({"questions": len(dataset), "pairs": len(pairs), "folder": str(output_dir / "pairs")}))
    else:
        print(f"{report}\nPairs: {output_dir / 'pairs'}")


@group.command("make")
def make(
    makers: Annotated[str, typer.Argument(help="Name of a maker, or several: jigsaw=2,rotation=1.")],
    pictures: Annotated[str, typer.Argument(help="Folder of pictures, or file or Hub id with a column image.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the rows.")],
    difficulty: Difficulty = None,
    count: MadeCount = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Pairs, right against nearest wrong answer.")] = False,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    image_folder: ImageFolder = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make questions with known answers of pictures alone. Pictures stay where they are; what is made of them is said.

    pivot prefs make jigsaw ./photos -o out --difficulty 0.5 --count 10000
    """
    shares = shares_of(makers.split(","))
    given = making_options(None, difficulty, count)
    with contextlib.redirect_stdout(sys.stderr):
        from pivot_plugin.generation.makers import Making, write_made
        from pivot_plugin.generation.makers import make as made_of

        making = Making(shares, seed=seed, **given)
        options: dict[str, Any] = {} if split is None else {"split": split}
        made = made_of(pictures, making, form="pairs" if pairs else "questions", image_folder=image_folder, **options)
        file = write_made(made, making, output_dir)
    print(json.dumps({"rows": len(made), "file": str(file)}) if as_json else f"{len(made):,} rows: {file}")


@group.command("audit")
def audit(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the MLLM that would be trained.")],
    pairs: Annotated[str, typer.Argument(help="File, folder, zip or Hub id of pairs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the audit, for keep and the report.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Look at the first so many pairs alone.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest own answer of the model.")] = 128,
    image_folder: ImageFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every pair as JSON.")] = False,
) -> None:
    """Tell what a model makes of pairs before it is trained on them: does the picture decide, are they its own words.

    pivot prefs audit llava-hf/llava-1.5-7b-hf ./pairs -o audit.json
    """
    with contextlib.redirect_stdout(sys.stderr):
        from pivot_plugin.preferences import audit as look
        from pivot_plugin.preferences import load

        rows = load(pairs, image_folder=image_folder)
        report = look(model, rows, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    print(json.dumps(report.as_dict()) if as_json else report)
    if output is not None:
        written = report.save(output)
        if not as_json:
            print(f"Audit: {written}")


@group.command("push")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of saved pairs.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is created.")] = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Also into a repository with other contents.")] = False,
) -> None:
    """Put saved pairs on the Hub in one commit, with their data card.

    pivot prefs push out/pairs me/my-pairs
    """
    from pivot_plugin.data.storage import push as upload

    print(upload(folder, repo_id, private=private or None, exist_ok=exist_ok))


def _processor(name: str | None) -> object | None:
    if name is None:
        return None
    from pivot_plugin.models.loading import load_processor

    return load_processor(name)
