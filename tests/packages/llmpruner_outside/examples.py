"""The examples in the reference of hooks, as their readers would type them."""

import inspect
import re
import textwrap

import torch  # noqa: F401
from pydantic import Field  # noqa: F401

from llmpruner import (
    ComponentSettings,  # noqa: F401
    Exporter,
    ImportanceCriterion,
    Metric,
    OutputError,  # noqa: F401
    RecoveryStrategy,
    Runtime,
    Session,
    work_of,  # noqa: F401
)


def fit(*arguments):
    from llmpruner import fit  # takes seconds to import

    return fit(*arguments)


for base in (ImportanceCriterion, Metric, Exporter, Session, Runtime, RecoveryStrategy):
    example = re.search(r"::\n\n((?:(?: {4}.*)?\n)+)", f"{inspect.cleandoc(base.__doc__)}\n")[1]
    exec(textwrap.dedent(example))
