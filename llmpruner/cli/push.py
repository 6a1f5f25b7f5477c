"""``llmpruner push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import PushSettings
from .console import RichProgress, done_line, note, out, size, table
from .derive import takes
from .options import catalog_of

if TYPE_CHECKING:
    from ..publishing.push import Upload


def add_commands(app: typer.Typer) -> None:
    app.command()(push)


@takes(settings=PushSettings)
def push(
    ctx: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint with llmpruner.json, as prune and recover write it.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")],
    settings: dict[str, Any],
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, with a model card from its record.

    A README.md in DIR is sent as it is. Otherwise one is written from llmpruner.json: what was cut, how, and how to
    load the model. Nothing is sent without --yes.
    """
    from .. import api

    upload = api.push(model, repo, progress=RichProgress(), catalog=catalog_of(ctx), **settings)
    if upload.url is not None:
        done_line(upload.url)
        return
    show_upload(upload)


def show_upload(upload: Upload) -> None:
    """Print the card and the files."""
    out.print(upload.card, markup=False, highlight=False, soft_wrap=True)
    sizes = upload.sizes
    table(f"Files for {upload.repo}", ("File", "Size"), [(name, _size(count)) for name, count in sizes.items()])
    note(f"nothing was sent; --yes instead of --dry-run sends these {_size(sum(sizes.values()))}")


def _size(count: int) -> str:
    return size(count) if count >= 2**20 else f"{count:,} bytes"
