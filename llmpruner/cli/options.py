"""Options that several commands share, and the parsing of what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, LlmprunerError, OutputError, SelectionError, UnknownNameError
from ..loading.options import DTYPES, LoadOptions
from ..structure.plan import BUDGETS, Target
from .console import note

if TYPE_CHECKING:
    from ..loading.model import LoadedModel
    from ..plugins.catalog import Catalog
    from ..structure.plan import Target

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, hub id, .gguf file, or 'demo'.")]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories, hub ids, .gguf files, or 'demo'.")]
Family = Annotated[str | None, typer.Option(help="Model family; by default the one that matches the configuration.")]
Dtype = Annotated[str, typer.Option(help=f"Weights in memory: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that a checkpoint brings.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Seed = Annotated[int, typer.Option(help="Same seed, same inputs: same result.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")]

HOW_MUCH = "say how much to remove with one of --ratio, --target-params or --unit-ratio"

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


def catalog_of(ctx: typer.Context) -> Catalog:
    catalog: Catalog = ctx.obj
    return catalog


def open_model(ctx: typer.Context, model: str, options: LoadOptions) -> LoadedModel:
    """Load a model for a command, once the device is known to work."""
    from ..loading.model import load_model

    check_device(options.device)
    note(f"loading {model}")
    return load_model(model, catalog_of(ctx), options)


def spliced(**factories: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take a value that is built from options which several commands share.

    The parameters of each factory become options of the command; the command receives what the factory returns,
    under the factory's name. Typer reads signatures, so the signature is what is put together.
    """
    options = {name: signature(factory, eval_str=True).parameters for name, factory in factories.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = {n: p for n, p in signature(command, eval_str=True).parameters.items() if n not in factories}
        merged = {**own, **{name: p for parameters in options.values() for name, p in parameters.items()}}
        every = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in merged.values()]

        def run(**values: Any) -> None:
            built = {name: f(**{o: values[o] for o in options[name]}) for name, f in factories.items()}
            command(**{name: values[name] for name in own}, **built)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in every}
        run.__signature__ = Signature(every)  # type: ignore[attr-defined]
        return run

    return decorate


def load_options(
    family: Family = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> LoadOptions:
    """How a model is loaded. Raises `UnknownNameError` for a dtype that is not there."""
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return LoadOptions(family, dtype, device, revision, trust_remote_code)


def check_device(device: str) -> None:
    """Raises `LlmprunerError` unless torch can compute on ``device``."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LlmprunerError(f"device '{device}' cannot be used: {reason}; try --device cpu") from error


def new_directory(path: Path) -> Path:
    """``path``, once it is sure that it can be created. Checked before any long work begins."""
    if path.exists():
        raise OutputError(f"output directory '{path}' exists already; choose another or remove it")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"the folder '{parent}' that should hold the output does not exist; create it first")
    return path


def new_file(path: Path) -> Path:
    """``path``, once it is sure that a file can be put there. Checked before any long work begins."""
    if path.is_dir():
        raise OutputError(f"'{path}' is a directory; name the file to write")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"the folder '{path.parent}' that should hold '{path.name}' does not exist; create it first")
    return path


def parse_target(
    ratio: float | None, target_params: str | None, unit_ratio: float | None, budget: str, context: int | None
) -> Target:
    """Exactly one of the three ways to say how much; only a ratio is one of a ``budget``."""
    from ..budgets.open import DEFAULT_CONTEXT

    given = [value for value in (ratio, target_params, unit_ratio) if value is not None]
    if len(given) != 1:
        raise SelectionError(HOW_MUCH)
    for name, share in (("--ratio", ratio), ("--unit-ratio", unit_ratio)):
        if share is not None and not 0 < share < 1:
            raise SelectionError(f"{name} {share:g} is outside (0, 1); it is the share to remove, 0.2 for a fifth")
    if budget not in BUDGETS:
        raise UnknownNameError("budget", budget, BUDGETS)
    if ratio is None and budget != "decoder":
        raise SelectionError(f"--budget {budget} says what --ratio is a share of; give the amount with --ratio")
    if ratio is not None:
        cached = (context or DEFAULT_CONTEXT) if budget in ("macs", "latency") else None
        return Target(by="ratio", amount=ratio, budget=budget, context=cached)
    if unit_ratio is not None:
        return Target(by="units", amount=unit_ratio)
    return Target(by="parameters", amount=parse_count(str(target_params)))


def parse_count(text: str) -> float:
    """``5.4B``, ``120M``, ``98000000`` as a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise SelectionError(f"--target-params '{text}' is not a number of parameters; write 5.4B, 120M or 98000000")
    return float(match[1]) * _UNITS[match[2]]


def parse_layers(text: str | None, count: int) -> tuple[int, ...] | None:
    """``3-26``, ``0,5,7-9`` or ``all`` → layer numbers; None stays None."""
    if text is None:
        return None
    if text.strip() == "all":
        return tuple(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise SelectionError(f"--layers '{text}' is not understood; write 3-26, 0,5,7-9 or all")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= count:
            raise SelectionError(f"--layers '{part.strip()}' is outside the model's layers 0-{count - 1}")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """A comma-separated list without blanks and repetitions."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise DataError(f"{option} is empty")
    return names
