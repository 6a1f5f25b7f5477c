from llmpruner import hookimpl

from .family import HeronFamily
from .reader import HeronReader


@hookimpl
def llmpruner_model_families():
    return [HeronFamily]


@hookimpl
def llmpruner_checkpoint_readers():
    return [HeronReader]
