"""Widths of every layer as one line of text."""

from html import escape

from llmpruner import ReportSection


class Widths(ReportSection):
    name = "widths"
    summary = "units of every group, by layer"

    def render(self, subject):
        items = [f"<li>{escape(group.name)}: {group.units}</li>" for group in subject.graph.groups]
        return f"<h2>Widths</h2><ul>{''.join(items)}</ul>"
