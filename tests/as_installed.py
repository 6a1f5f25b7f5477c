"""Packages as an installer leaves them."""

from pathlib import Path


def install(site: Path, package: str, *, entry: str | None = None) -> str:
    """Write the metadata of ``package`` into the folder ``site``, with an entry point for the module of its name;
    returns the module, which must be on the path too."""
    module = package.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    points = f"[llmpruner]\n{entry or package.removeprefix('llmpruner-')} = {module}\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    return module
