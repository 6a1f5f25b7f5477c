"""``llmpruner doctor``: what it finds, and when it fails."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llmpruner import ModelFamily, hookimpl, plugin_manager
from llmpruner.cli import doctor
from llmpruner.cli.app import build_app


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Importing every dependency takes ten seconds; one test does it."""
    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def checks_of(outcome) -> dict[tuple[str, str], dict[str, str]]:
    return {(c["section"], c["name"]): c for c in json.loads(outcome.out)["checks"]}


def test_a_healthy_installation(run, monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", {"torch": "torch.export", "transformers": "transformers.modeling_utils"})
    done = run("doctor", "--json")
    assert done.code == 0, done.out
    assert json.loads(done.out)["healthy"]
    checks = checks_of(done)
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "pluggy", "safetensors"):
        assert checks["packages", name]["status"] == "ok"
        assert "supported: >=" in checks["packages", name]["detail"]
    assert checks["imports", "torch.export"]["status"] == "ok"
    assert "computes in float32" in checks["devices", "cpu"]["detail"]
    assert "HF_HUB_OFFLINE" in checks["hub", "access"]["detail"]
    assert "family llama" in checks["plugins", "llama"]["detail"]
    assert ("packages", "pytest") not in checks


def test_the_table(run):
    done = run("doctor")
    assert done.code == 0
    assert "transformers" in done.out and "0 broken" in done.err


@pytest.mark.parametrize(
    ("package", "version", "status", "code"),
    [("transformers", "4.57.0", "broken", 1), ("transformers", None, "broken", 1), ("peft", None, "absent", 0)],
)
def test_versions_outside_the_supported_range(run, monkeypatch, package, version, status, code):
    real = doctor.metadata.version

    def other(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", other)
    done = run("doctor", "--json")
    assert done.code == code
    assert checks_of(done)["packages", package]["status"] == status


def test_what_a_range_does_not_explain():
    (found,) = doctor._incompatible("torch", "2.5.1")
    assert found.status == "broken" and ".bin" in found.detail
    assert list(doctor._incompatible("torch", "2.9.0")) == []


def test_a_dependency_that_cannot_be_imported(run, monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", {"torch": "torch.no_such_module"})
    done = run("doctor", "--json")
    assert done.code == 1
    assert checks_of(done)["imports", "torch.no_such_module"]["detail"].startswith("ModuleNotFoundError: ")


def test_blocked_and_broken_plugins(monkeypatch):
    monkeypatch.setenv("LLMPRUNER_BLOCK", "vicuna")
    host = plugin_manager()
    host.record("bad", "ImportError: nothing there", package="llmpruner-bad")
    found = {c.name: c for c in doctor.checks(host) if c.section == "plugins"}
    assert found["vicuna"].status == "warning" and "LLMPRUNER_BLOCK" in found["vicuna"].detail
    assert (found["bad"].status, found["bad"].detail) == ("broken", "from llmpruner-bad: ImportError: nothing there")


def test_two_families_of_one_name_are_a_finding_and_no_crash():
    class Twin(ModelFamily):
        name = "llama"
        model_types = ("llama",)

    class Plugin:
        @hookimpl
        def llmpruner_model_families(self):
            return [Twin]

    host = plugin_manager()
    host.manager.register(Plugin(), "twin")
    done = CliRunner().invoke(build_app(host), ["doctor", "--json"])
    assert done.exit_code == 1
    found = {c["name"]: c["detail"] for c in json.loads(done.stdout)["checks"] if c["status"] == "broken"}
    assert set(found) == {"llama", "twin"}
    assert "two family classes are named 'llama': LlamaFamily of llmpruner and Twin of in-process" in found["twin"]


def test_a_hub_that_does_not_answer_is_no_failure(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = run("doctor", "--json")
    assert done.code == 0
    hub = checks_of(done)["hub", "access"]
    assert hub["status"] == "warning" and "does not answer" in hub["detail"]


def test_a_device_that_computes_wrongly(monkeypatch):
    import torch

    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, dtype, **k: real(*a, dtype=dtype, **k) * (dtype is torch.float32))
    found = doctor._device(torch, "cpu", "a cpu")
    assert (found.status, found.detail) == ("warning", "a cpu; bfloat16 gives wrong results")
