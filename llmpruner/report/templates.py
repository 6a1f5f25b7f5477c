"""Rendering the Jinja templates of this package."""

from __future__ import annotations

from typing import Any


def rendered(template: str, **values: Any) -> str:
    """The template of that file name, rendered with ``values``, which are escaped for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("llmpruner.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(**values)
