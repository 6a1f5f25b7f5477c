"""``llmpruner convert``: between Meta's format and Hugging Face's, and from delta weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpruner import LlmprunerError, ModelError

if TYPE_CHECKING:
    import torch


class Format(str, Enum):
    HF = "hf"
    META = "meta"


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def add_commands(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")],
    source: Annotated[Path | None, typer.Argument(help="A LLaMA folder in either format.")] = None,
    to: Annotated[Format, typer.Option(help="hf: Hugging Face's format; meta: Meta's own.")] = Format.HF,
    base: Annotated[Path | None, typer.Option(help="LLaMA, in either format, that --delta is added to.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Official delta weights, such as Vicuna's v0 and v1.1.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO,
    shards: Annotated[int, typer.Option(min=1, help="With --to meta: number of consolidated.NN.pth files.")] = 1,
    family: Annotated[str | None, typer.Option(help="With --delta: the family it belongs to.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="With --to meta: a tokenizer.model from elsewhere.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Convert the weights alone.")] = False,
) -> None:
    """Convert LLaMA between Meta's and Hugging Face's formats, or add delta weights to it.

    Reads and writes one tensor at a time, which takes a few GiB of memory for any size.
    """
    if (base is None) != (delta is None) or (source is None) == (delta is None):
        raise LlmprunerError("give either a SOURCE to convert, or both --base and --delta")
    for path in (source, base, delta):
        if path is not None and not path.is_dir():
            raise ModelError(f"model directory '{path}' does not exist")
    if base is not None and delta is not None:
        from .deltas import delta_family

        if to is not Format.HF:
            raise LlmprunerError("a delta is applied to Hugging Face's format; convert the result with --to meta after")
        delta_family(ctx.obj, family).apply_delta(base, delta, output, _torch_dtype(dtype))
    elif source is not None and to is Format.META:
        from .meta_reader import MetaReader
        from .meta_writer import convert_to_meta

        if dtype is not Dtype.AUTO:
            raise LlmprunerError("--to meta keeps the type of the weights; leave --dtype out")
        if MetaReader().recognises(source):
            raise ModelError(f"{source} is in Meta's format already")
        lost = convert_to_meta(source, output, shards, tokenizer=None if no_tokenizer else tokenizer or True)
        for remark in lost:
            typer.echo(f"note: {remark}", err=True)
    elif source is not None:
        if (source / "config.json").is_file():
            raise ModelError(f"{source} is in Hugging Face's format already; use --to meta for the other direction")
        from .meta_convert import convert_to_huggingface

        convert_to_huggingface(source, output, _torch_dtype(dtype), tokenizer=not no_tokenizer)
    typer.echo(f"wrote {output}")


def _torch_dtype(dtype: Dtype) -> torch.dtype | None:
    import torch

    chosen: torch.dtype | None = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    return chosen
