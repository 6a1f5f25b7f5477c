"""On a device, models are measured, answer and are exported as on the CPU."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
from device_cases import begin, dense, like_the_cpu, prune, said, text
from llmpruner_chat import Chat

from llmpruner import api
from llmpruner.settings import LoadSettings

MODELS = ("llama-4", "pruned")


def evaluated(load):
    measured = api.evaluate(
        MODELS,
        load=load,
        perplexity=text(),
        window=32,
        kl=True,
        metrics=["answers"],
        settings={"answers": {"tokens": 4}},
    )
    return [result.results for result in measured]


def generated(load):
    return [api.generate("pruned", "The quick", load=load, max_new_tokens=12, temperature=t) for t in (0.0, 1.0)]


def talked(load):
    chat, pieces = Chat(api.load("pruned", **load.given()), max_new_tokens=8), []
    for question in ("Why?", "And then?"):
        chat.ask(question, pieces.append)
    return chat.exchanges, pieces


def timed(load):
    result = api.bench(MODELS, load=load, batch=1, prompt=4, new=2, rounds=1)
    assert result.device == load.device
    return [[model.name for model in case.models] for case in result.cases]


def exported(load, to, model="pruned"):
    output = Path(f"{to}-{load.device}")
    api.export(model, to=to, output=output, load=load)
    files = sorted(file for file in output.rglob("*") if file.suffix in {".gguf", ".safetensors"})
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def verified(load):
    return {check.name: check.state for check in api.verify_checkpoint("pruned", load=load).checks}


WORK = {
    "evaluate": evaluated,
    "generate": generated,
    "chat": talked,
    "bench": timed,
    "verify": verified,
    "export to gguf": partial(exported, to="gguf"),
    "export to nemotron-nas": partial(exported, to="nemotron-nas"),
    "export to stock": partial(exported, to="stock", model="uniform"),
}


@pytest.mark.slow
def test_everything_else(on_device):
    assert on_device(different) == {}


def different():
    for name, shape in (("pruned", "free"), ("uniform", "uniform")):
        prune(dense("llama"), name, "cpu", importance="l2", compensate="none", ratio=0.2, shape=shape)
    begin(float64=False)
    found = {"auto": str(api.load(MODELS[0]).network.device).replace("standin:0", "")}
    for name, work in WORK.items():
        try:
            with like_the_cpu():
                expected, result = (work(LoadSettings(device=device)) for device in ("cpu", "standin:1"))
            found[name] = "" if result == expected else f"{result}, not {expected}"
        except Exception as error:
            found[name] = said(error)
    return {name: why for name, why in found.items() if why}
