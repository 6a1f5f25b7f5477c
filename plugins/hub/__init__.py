"""``llmpruner push``: publish a checkpoint on the Hugging Face Hub, with a model card from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmpruner import hookimpl


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    app.command("push")(_push)


def _push(
    ctx: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint with llmpruner.json, as prune and recover write it.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it; else nothing leaves this machine.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence, such as apache-2.0; by default what the dense model's card states."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Hub id of the dense model, if it was pruned from local files."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Figures for the card: a file that `evaluate --json` wrote.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a checkpoint's code.")] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, with a model card from its record.

    A README.md in DIR is sent as it is. Otherwise one is written from llmpruner.json: what was cut, how, and how to
    load the model. Without --yes, the card and the files are shown, and nothing is sent.
    """
    from .push import CARD_FILE, prepare, send

    files = prepare(
        model, repo, license=license, base_model=base_model, evaluation=evaluation,
        trust_remote_code=trust_remote_code, catalog=ctx.obj,
    )  # fmt: skip
    if yes:
        typer.echo(f"✓ {send(repo, files, public=public)}")
        return
    typer.echo(files[CARD_FILE])
    for name, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        typer.echo(f"{size:>15,} bytes  {name}")
    typer.echo(f"nothing was sent; --yes sends these files to {repo}", err=True)
