"""On a device, every method and criterion makes the CPU's plan and the CPU's weights, bit for bit."""

import itertools

import pytest
from device_cases import begin, dense, differences, prune, said, text

FLOAT64, NONE = "float64", "no float64"
RESIDENT, STREAMED = "resident", "streamed"
EVERY = tuple(itertools.product((FLOAT64, NONE), (RESIDENT, STREAMED)))
EACH_ONCE = ((FLOAT64, STREAMED), (NONE, RESIDENT))
TEXT = {"samples": 4, "length": 16}
KINDS = {
    "mlp,attention": {"ratio": 0.2},
    "layer": {"ratio": 0.25, "layers": "all"},
    "hidden": {"ratio": 0.1},
    "expert": {"ratio": 0.25, "layers": "all"},
    "vocabulary": {"ratio": 0.01, "budget": "parameters"},
}
MODELS = {"expert": "mixtral"}
METHODS = {"best": EVERY, "fast": EACH_ONCE, "llm-pruner": EACH_ONCE}


def different(cases, places, *, device="standin", bfloat16=False):
    """Where the result on a device is not that of the CPU, and why. ``cases``: by name, a model and settings;
    ``bfloat16``: both multiply faster in it."""
    found = {}
    for number, (name, (model, settings)) in enumerate(cases.items()):
        options = {"calibration": text(), "bfloat16": bfloat16, **settings}
        prune(dense(model), f"cpu-{number}", "cpu", **options)
        for sums, weights in places:
            begin(float64=sums == FLOAT64, bfloat16=bfloat16)
            output = f"{sums}-{weights}-{number}"
            try:
                prune(dense(model), output, device, streamed=weights == STREAMED, **options)
                why = differences(output, f"cpu-{number}")
            except Exception as error:
                why = said(error)
            found[f"{name}, {output}"] = why
    return {name: why for name, why in found.items() if why}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_for_every_kind(on_device, method):
    assert on_device(of_method, method) == {}


def of_method(method):
    cases = {
        kind: (MODELS.get(kind, "llama"), {"method": method, "kinds": kind, **TEXT, **settings})
        for kind, settings in KINDS.items()
    }
    if method == "llm-pruner":
        cases["vocabulary"][1]["importance"] = "vocabulary"  # its own scores no tokens
    return different(cases, METHODS[method])


LAYER = {"kinds": "layer", **KINDS["layer"]}
CRITERIA = {
    **{name: {"importance": name} for name in ("random", "l1", "l2", "energy", "wanda-sp", "flap", "activation")},
    **{name: {"importance": name} for name in ("fisher", "obs")},
    "taylor, mixed": {"importance": "taylor", "settings": {"taylor": {"variant": "mix"}}},
    "pca": {"importance": "pca", "kinds": "hidden", "ratio": 0.1},
    **{name: {"importance": name, **LAYER} for name in ("angular", "angular-block", "block-influence")},
    "refit": {"importance": "l2", "compensate": "refit"},
    "query": {"importance": "energy", "kinds": "query", "ratio": 0.1},
}
EXPERTS = {
    f"expert-{name}": {"importance": f"expert-{name}", "kinds": "expert", **KINDS["expert"]}
    for name in ("contribution", "frequency", "norm", "reap")
}
WITH_BIASES = {
    "best": {"method": "best", "kinds": "mlp,attention"},
    "bias": {"importance": "flap", "compensate": "bias"},
}
WHOLE = {
    "steps": {"importance": "taylor", "steps": 2},
    "sensitivity": {"importance": "l2", "allocation": "sensitivity"},
    "global": {"importance": "taylor", "allocation": "global", "shape": "free"},
    "kv-cache": {"importance": "l2", "kinds": "attention", "budget": "kv-cache", "ratio": 0.5},
    "text of its own": {"method": "best", "calibration": "self"},
}


def with_text(cases):
    return {name: {"ratio": 0.2, **TEXT, **settings} for name, settings in cases.items()}


@pytest.mark.slow
@pytest.mark.parametrize("function", ["of_criteria", "of_other_models", "in_memory", "in_bfloat16"])
def test_every_criterion_and_allocation(on_device, function):
    assert on_device(globals()[function]) == {}


def of_criteria():
    cases = {name: ("llama", settings) for name, settings in with_text(CRITERIA).items()}
    return different(cases, [(NONE, STREAMED)])


def of_other_models():
    cases = {name: ("mixtral", settings) for name, settings in with_text(EXPERTS).items()}
    cases |= {name: ("gpt2", settings) for name, settings in with_text(WITH_BIASES).items()}
    return different(cases, [(NONE, STREAMED)])


def in_memory():
    cases = {name: ("llama", settings) for name, settings in with_text(WHOLE).items()}
    return different(cases, [(NONE, RESIDENT)], device="standin:1")


def in_bfloat16():
    cases = with_text({"best": {"method": "best", "kinds": "mlp,attention"}, "taylor": {"importance": "taylor"}})
    cases = {name: ("llama", settings) for name, settings in cases.items()}
    return different(cases, [(NONE, RESIDENT), (NONE, STREAMED)], bfloat16=True)
