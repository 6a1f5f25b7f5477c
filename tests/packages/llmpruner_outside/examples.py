"""The examples in the reference of hooks, as their readers would type them."""

import inspect
import re
import textwrap

import torch
from pydantic import Field

import llmpruner

names = {"__name__": __name__, "torch": torch, "Field": Field}
names |= {name: getattr(llmpruner, name) for name in llmpruner.__all__}
BASES = ("ImportanceCriterion", "Metric", "Exporter", "Session", "Runtime", "RecoveryStrategy")
for base in BASES:
    text = inspect.cleandoc(getattr(llmpruner, base).__doc__)
    exec(textwrap.dedent(re.search(r"::\n\n((?:(?: {4}.*)?\n)+)", text + "\n")[1]), names)
Magnitude, Vocabulary, Weights, Slow, Imitation = (
    names[name] for name in ("Magnitude", "Vocabulary", "Weights", "Slow", "Imitation")
)
