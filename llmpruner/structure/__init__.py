"""The structure of a model as plain data: units, coupled groups, plans. Nothing here imports torch."""

from . import layouts as layouts
