"""Evaluating models that are in memory."""

from collections.abc import Callable

import tiny_models
from llmpruner_llama import LlamaFamily

from llmpruner import Metric, Model, build_graph
from llmpruner.evaluation.evaluate import ComparedModel, Evaluations, evaluate
from llmpruner.models.reference import Reference
from llmpruner.progress import QUIET, Progress


def in_memory(name="tiny", model=None, tokenizer=None, family=None, **options) -> Model:
    model = model or tiny_models.llama(**options)
    graph = build_graph(LlamaFamily(), model.config) if model.config.model_type == "llama" else None
    tokenizer = tokenizer or tiny_models.tokenizer()
    return Model(Reference(name), model.config, family or LlamaFamily(), graph, network=model, tokenizer=tokenizer)


def evaluated(loaders: list[Callable[[], Model]], metrics: list[Metric], progress: Progress = QUIET) -> Evaluations:
    """The models that ``loaders`` load, of which nothing is known before."""
    for metric in metrics:
        metric.prepare()
    config, tokenizer = tiny_models.llama().config, tiny_models.tokenizer()
    models = [ComparedModel(f"model {n}", config, tokenizer, load) for n, load in enumerate(loaders)]
    return evaluate(models, metrics, progress)
