"""`jina-bert convert`, `export`, `verify`, `info` and `push`: model folders, through the modules of those commands."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .group import FAILED, fail
from .options import Precision
from .run import say

EXAMPLES = {
    "convert": "jina-bert convert jinaai/jina-embeddings-v2-small-en small-en",
    "export": "jina-bert export runs/hard/final tiny --card CARD.md --onnx fp32,int8 --gguf f16",
    "card": "jina-bert card tiny/README.md --results evaluation/results/tiny.json --model hub_repo/tiny",
    "verify": "jina-bert verify hub_repo/tiny",
    "info": "jina-bert info jinaai/jina-embeddings-v2-base-de --revision main",
    "push": "jina-bert push hub_repo/tiny me/tiny --dry-run",
}

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Model folder.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the folder's code although it is not the package's.")]
Dtype = Annotated[Precision | None, typer.Option(help="Of the stored weights.")]


def convert(
    source: Annotated[str, typer.Argument(help="Folder, or name of a Hub repository.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    to: Annotated[str, typer.Option(help='"ours", or "official": the form of the published repositories.')] = "ours",
    dtype: Dtype = None,
    keep_head: Annotated[bool, typer.Option("--keep-head", help="Keep an MLM or task head.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository.")] = None,
):
    """Convert a published folder or repository to a folder that loads today, or back.

    Every tensor is accounted for, and the output is compared with the source before it appears.
    """
    from ..convert import convert as convert_folder
    from ..folders.loading import quiet_transformers

    quiet_transformers()
    report = convert_folder(
        source, output, target=to, dtype=dtype and dtype.value, keep_head=keep_head, revision=revision
    )
    print("\n".join(report.lines()))


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint: the final folder of a stage, or the official form.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[Precision, typer.Option(help="Of the stored weights.")] = Precision.float16,
    card: Annotated[Path | None, typer.Option(help="Model card to publish as README.md.")] = None,
    onnx: Annotated[str, typer.Option(help="Precisions, of fp32,fp16,int8.")] = "",
    openvino: Annotated[bool, typer.Option("--openvino", help="The OpenVINO form.")] = False,
    gguf: Annotated[str, typer.Option(help="Types for llama.cpp, of f32,f16,q8_0.")] = "",
    tei: Annotated[Path | None, typer.Option(help="Folder for text-embeddings-inference, beside the output.")] = None,
):
    """Write a publishable folder from a checkpoint, and the files of other engines.

    Everything is loaded in its own engine and compared with the checkpoint before it appears.
    """
    from ..export import Formats, export_formats
    from ..folders.loading import quiet_transformers

    quiet_transformers()
    formats = Formats(onnx=_listed(onnx), openvino=openvino, gguf=_listed(gguf), tei=tei)
    for file in export_formats(model, output, dtype=dtype.value, card=card, formats=formats):
        print(f"wrote and verified {file.path} ({file.size / 1e6:.1f} MB): {file.agreement}")
    print(f"wrote and verified {output}")
    if not (output / "README.md").is_file():
        say(f"note: {output} has no model card (README.md), which a push needs: --card CARD.md writes one.")


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def card(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The card, a Markdown file; changed in place.")
    ],
    results: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Of evaluation.local, for the model-index; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Whose results to take, as named in them.")] = None,
    name: Annotated[str | None, typer.Option(help="In the model-index; the heading of the card by default.")] = None,
    tags: Annotated[str, typer.Option(help="Tags to add, separated by commas.")] = "",
):
    """Put tags and scores into a model card, and check its metadata as the Hub does.

    Its text stays; a card that may not be published is left as it was.
    """
    from ..model_card import main

    if bool(results) != (model is not None):
        raise ValueError("--results and --model belong together: give both.")
    arguments = [str(file), f"--tags={tags}"]
    arguments += ["--results", *map(str, results or ()), f"--model={model}"] if results else []
    return main([*arguments, f"--name={name}"] if name is not None else arguments)


def verify(
    folder: Folder,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
):
    """Check a folder: whole, safe, loads in a fresh process. Status 1 if there is an error.

    None of its code runs unless it is the package's byte for byte, or --trust is given.
    """
    from ..folders.loading import quiet_transformers
    from ..verify import verify_folder

    quiet_transformers()
    report = verify_folder(folder, trust=trust)
    if as_json:
        findings = [dataclasses.asdict(finding) for finding in report.findings]
        print(json.dumps({"folder": str(folder), "ok": report.ok, "findings": findings}, indent=2))
    else:
        for finding in report.findings:
            print(finding)
    number = len(report.errors)
    say(f"{folder}: {'verified' if report.ok else '1 error' if number == 1 else f'{number} errors'}")
    return 0 if report.ok else 1


def info(
    source: Annotated[str, typer.Argument(help="Folder, or name of a Hub repository.")],
    revision: Annotated[
        str | None, typer.Option(help="Of a Hub repository: branch, tag, commit or refs/pr/N.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
):
    """Say what a folder or repository is, whether it will load, and what is missing.

    Runs none of its code and reads no tensor: of a repository, small JSON files and the headers of the weights. Status
    0 if it could be read, also where it will not load: "loads" says that, and `verify` is the check.
    """
    from ..inspect_folder import inspect_source

    found = inspect_source(source, revision)
    print(json.dumps(dataclasses.asdict(found), indent=2, default=str) if as_json else "\n".join(found.lines()))


def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="owner/name; created if there is none.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility; that of the owner's default if left out.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch (made if there is none) or refs/pr/N.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete files that only the Hub has.")] = False,
    trust: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, compare, and send nothing.")] = False,
):
    """Publish a folder to the Hub in one commit, or not at all.

    The token is that of HF_TOKEN or `hf auth login`, never an argument. A folder that may not be published is refused
    with a line for each reason.
    """
    from ..folders.loading import quiet_transformers
    from ..hub.publishable import UnpublishableFolder
    from ..push import describe
    from ..push import push as push_folder

    quiet_transformers()
    try:
        result = push_folder(
            folder, repo_id, dry_run=dry_run, private=private, revision=revision, create_pr=create_pr, tag=tag,
            commit_message=commit_message, prune=prune, trust=trust,
        )  # fmt: skip
    except UnpublishableFolder as error:
        reasons = "1 reason" if len(error.problems) == 1 else f"{len(error.problems)} reasons"
        fail(f"{folder} cannot be published, for {reasons}:")
        for problem in error.problems:
            say(f"  {problem}")
        return FAILED
    print(describe(result))
    return 0
