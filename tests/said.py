"""A `Progress` that keeps its messages, and one that ends the run."""

from contextlib import contextmanager

from llmpruner.progress import Progress


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def status(self, label: str) -> None:
        self.lines.append(label)


class Killed(BaseException):
    """Stands for the end of the process: no handler of `Exception` sees it."""


class StopAt(Progress):
    """Ends the run at the item ``number`` of the bar ``label``, or at a line that has ``label``."""

    def __init__(self, label, number=0):
        self.label, self.number = label, number

    def track(self, items, label):
        for number, item in enumerate(items):
            if (label, number) == (self.label, self.number):
                raise Killed
            yield item

    def status(self, label):
        if label.startswith(self.label):
            raise Killed

    @contextmanager
    def bar(self, label):
        def at(share, now):
            if self.label in now:
                raise Killed

        yield at
