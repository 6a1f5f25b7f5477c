"""``llmpruner doctor``."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import __version__
from ..amounts import counted
from ..errors import LlmprunerError, first_line
from ..plugins.host import PluginHost
from .console import err, print_json, size, table
from .options import Json

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog

OK, WARNING, BROKEN, ABSENT = "ok", "warning", "broken", "absent"
COLOURS = {OK: "green", WARNING: "yellow", BROKEN: "red", ABSENT: "dim"}

PROBES = {
    "torch": "torch.export",
    "transformers": "transformers.modeling_utils",
    "peft": "peft.tuners.lora",
    "datasets": "datasets",
    "lm-eval": "lm_eval.models.huggingface",
}
"""Distribution → the module whose import shows whether it works with the other installed versions."""

INCOMPATIBLE = (
    ("torch", "<2.6", "transformers refuses to read .bin checkpoints; upgrade torch or convert them to safetensors"),
    ("peft", "<0.18", "it imports cache classes that transformers 5 no longer has; upgrade peft"),
    ("lm-eval", "<0.4.10", "it looks for model classes that transformers 5 no longer has; upgrade lm-eval"),
)
"""Distribution, versions, and what does not work with them."""

HUB_TIMEOUT = 3.0
LITTLE_MEMORY, LITTLE_DISK = 4 << 30, 10 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One result. ``status``: ok, warning (with limitations), broken, or absent (optional, not installed)."""

    section: str
    name: str
    status: str
    detail: str


def add_commands(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Examine this installation: versions, plugins, devices, memory, hub. Exits with 1 when something is broken."""
    host: PluginHost = ctx.obj.host
    found = list(checks(host))
    count = Counter(check.status for check in found)
    if as_json:
        print_json({"healthy": not count[BROKEN], "checks": [asdict(check) for check in found]})
    else:
        rows = [(c.section, c.name, c.status, c.detail) for c in found]
        table(None, ("", "What", "Status", "Detail"), rows, left=4)
        colour = COLOURS[BROKEN if count[BROKEN] else WARNING if count[WARNING] else OK]
        err.print(f"[{colour}]{count[BROKEN]} broken, {count[WARNING]} to know about[/]", highlight=False)
    if count[BROKEN]:
        raise typer.Exit(1)


def checks(host: PluginHost) -> Iterator[Check]:
    """All checks, in the order shown."""
    yield Check("python", "llmpruner", OK, __version__)
    yield Check("python", platform.python_implementation(), OK, f"{platform.python_version()} on {platform.system()}")
    for section in (_packages, _imports, _devices, _memory, _hub):
        yield from section()
    yield from _plugins(host)


def _packages() -> Iterator[Check]:
    """Every dependency against the version range in the installed metadata."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("llmpruner") or []
    except metadata.PackageNotFoundError:
        yield Check("packages", "llmpruner", BROKEN, "runs from source without being installed: pip install -e .")
        return
    seen: set[str] = set()
    for requirement in map(Requirement, stated):
        extra = _extra_of(requirement.marker)
        if extra in ("all", "dev") or requirement.name == "llmpruner" or requirement.name in seen:
            continue
        seen.add(requirement.name)
        wanted = f"supported: {requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            status, remedy = (ABSENT, f"llmpruner[{extra}]") if extra else (BROKEN, "llmpruner")
            yield Check("packages", requirement.name, status, f"not installed; pip install '{remedy}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check("packages", requirement.name, OK if fits else BROKEN, f"{version} ({wanted})")
        yield from _incompatible(requirement.name, version)


def _extra_of(marker: object) -> str | None:
    """The extra of a requirement's marker ``extra == "name"``."""
    text = str(marker or "")
    return text.partition("extra ==")[2].strip().strip("\"'") or None


def _incompatible(name: str, version: str) -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    for package, versions, what in INCOMPATIBLE:
        if package == name and SpecifierSet(versions).contains(version, prereleases=True):
            yield Check("packages", name, BROKEN, f"{version}: {what}")


def _imports() -> Iterator[Check]:
    """Imports of distributions, which may not work together although their versions fit."""
    for distribution, module in PROBES.items():
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue  # reported by `_packages`
        try:
            importlib.import_module(module)
        except Exception as error:  # broken installations raise anything
            yield Check("imports", module, BROKEN, _text(error))
        else:
            yield Check("imports", module, OK, "")


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # reported by `_imports`
        return
    capability = torch.backends.cpu.get_cpu_capability()
    yield _device(torch, "cpu", f"{counted(torch.get_num_threads(), 'thread')}, {capability}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            yield _device(torch, f"cuda:{number}", f"{properties.name}, {size(properties.total_memory)}")
    elif torch.version.cuda:
        yield Check("devices", "cuda", WARNING, f"torch is built for CUDA {torch.version.cuda}, but sees no GPU")
    if torch.backends.mps.is_available():
        yield _device(torch, "mps", "Apple GPU")


def _device(torch: Any, name: str, what: str) -> Check:
    """Computes a matrix product in float32 and in bfloat16, as reported support is not always correct."""
    for dtype in (torch.float32, torch.bfloat16):
        try:
            square = torch.ones(8, 8, device=name, dtype=dtype)
            works = bool(((square @ square) == 8).all())
            reason = "gives wrong results"
        except (RuntimeError, TypeError, AssertionError) as error:
            works, reason = False, _text(error)
        if not works:
            status = BROKEN if dtype == torch.float32 else WARNING
            return Check("devices", name, status, f"{what}; {str(dtype).removeprefix('torch.')} {reason}")
    return Check("devices", name, OK, f"{what}; computes in float32 and bfloat16")


def _memory() -> Iterator[Check]:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        yield Check("memory", "RAM", WARNING, "this system does not report its size")
    else:
        yield Check("memory", "RAM", WARNING if total < LITTLE_MEMORY else OK, size(total))
    cache = _constant("HF_HUB_CACHE")
    if cache is None:
        return
    folder = Path(str(cache))
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    usable = os.access(existing, os.W_OK)
    detail = f"{size(free)} free for {folder}" + ("" if usable else ", which cannot be written")
    yield Check("memory", "model cache", OK if usable and free >= LITTLE_DISK else WARNING, detail)


def _hub() -> Iterator[Check]:
    """One short request; none if HF_HUB_OFFLINE is set. Without access, local models still work."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    if _constant("HF_HUB_OFFLINE"):
        yield Check("hub", "access", OK, "HF_HUB_OFFLINE is set: only local and cached models")
        return
    endpoint = _constant("ENDPOINT")
    if endpoint is None:
        return
    try:
        urlopen(Request(str(endpoint), method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        pass  # the hub is reachable
    except (OSError, ValueError) as error:
        detail = f"{endpoint} does not answer ({_text(error)}); local models work, HF_HUB_OFFLINE=1 saves the waiting"
        yield Check("hub", "access", WARNING, detail)
        return
    yield Check("hub", "access", OK, f"{endpoint} answers")


def _constant(name: str) -> object:
    """A setting as huggingface_hub reads it from the environment; None where it cannot be imported."""
    try:
        constants = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        return None
    value: object = getattr(constants, name, None)
    return value


def _plugins(host: PluginHost) -> Iterator[Check]:
    from ..plugins.catalog import Catalog

    try:
        catalog = Catalog(host)
    except LlmprunerError as error:
        yield Check("plugins", "catalog", BROKEN, str(error))
    else:
        yield from _offers(catalog)
    for broken in dict.fromkeys(host.broken):
        yield Check("plugins", broken.name, BROKEN, f"from {broken.package}: {broken.reason}")
    for name in host.blocked:
        yield Check("plugins", name, WARNING, "left out by LLMPRUNER_BLOCK")


def _offers(catalog: Catalog) -> Iterator[Check]:
    """The components of each plugin, and where its code is."""
    host = catalog.host
    registries = tuple(catalog.registries)
    for name, plugin in sorted(host.manager.list_name_plugin()):
        if plugin is None or name not in host.packages:
            continue
        module = getattr(plugin, "__name__", type(plugin).__name__)
        offered = [
            f"{registry.kind} {key}"
            for registry in registries
            for key, cls in registry.items()
            if cls.__module__.partition(".")[0] == module.partition(".")[0]
        ]
        where = getattr(sys.modules.get(module), "__file__", None)
        what = ", ".join(offered) if offered else "nothing"
        yield Check("plugins", name, OK, f"{host.package_of(name)}: {what} ({where or module})")


def _text(error: BaseException) -> str:
    """Class and first line, at most 300 characters."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]
