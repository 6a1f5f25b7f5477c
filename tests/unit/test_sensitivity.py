"""Curves of divergence over share: measured point by point, continued after a kill, and read by an allocation."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as xml

import pytest
import tiny_models
import torch

from llmpruner import api
from llmpruner.errors import LlmprunerError, OutputError, SelectionError, SettingsError
from llmpruner.pruning.allocation.curve import Curve, GroupCurve, Point
from llmpruner.pruning.compensation.trials import Trials
from llmpruner.pruning.methods.presets import Fast

OPTIONS = {"shares": "0.25,0.5", "importance": "l2", "samples": 4, "length": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_models.llama(layers=3)
    with torch.no_grad():
        # The products of layer 1 are small beside the others', so that its channels matter little; not so little that
        # the divergence is lost in rounding.
        for layer in (0, 2):
            model.model.layers[layer].mlp.down_proj.weight.mul_(20)
    model.save_pretrained(folder / "model")
    tiny_models.tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_models.TEXT * 4)
    return str(folder / "model")


@pytest.fixture(scope="module")
def text(source):
    return source.removesuffix("model") + "text.txt"


@pytest.fixture(scope="module")
def measured(source, text, tmp_path_factory):
    file = tmp_path_factory.mktemp("curve") / "curve.json"
    return file, api.sensitivity(source, output=file, calibration=text, kinds="mlp,attention", **OPTIONS)


def test_the_curve_has_a_point_for_every_share_of_every_group(measured):
    file, curve = measured
    assert [group.layer for group in curve.groups if group.kind == "mlp"] == [0, 1, 2]
    by_name = {(group.kind, group.layer): group for group in curve.groups}
    assert [point.removed for point in by_name["mlp", 0].points] == [12, 24]
    # Of two KV heads only one can go, so that both shares are one point.
    assert [point.removed for point in by_name["attention", 0].points] == [1]
    middle, ends = by_name["mlp", 1].points[-1], [by_name["mlp", n].points[-1] for n in (0, 2)]
    assert all(end.divergence > 10 * middle.divergence > 0 for end in ends)
    assert Curve.read(file) == curve and curve.measured["calibration"].endswith("text.txt")
    assert not file.with_name("curve.json.measuring").exists()


def test_the_plot_has_a_line_for_every_group(measured):
    file, curve = measured
    drawn = xml.fromstring(file.with_suffix(".svg").read_text())
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(group.name for group in curve.groups)


@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_an_allocation_from_the_curve_removes_more_where_it_is_flat(source, measured, shape):
    file, curve = measured
    kinds = {"kinds": "mlp,attention"} if shape == "uniform" else {"kinds": "mlp"}
    plan = api.plan(
        source, ratio=0.15, importance="l2", shape=shape, layers="all", allocation="curve", round_to=1, **kinds,
        settings={"curve": {"file": str(file)}},
    )  # fmt: skip
    kept = {name: len(units) for name, units in plan.kept.items()}
    sizes = {group.name: group for group in curve.groups}
    gone = {name: sizes[name].units - count for name, count in kept.items()}
    if shape == "free":
        by_layer = {sizes[name].layer: count for name, count in gone.items()}
        assert by_layer[1] > 2 * max(by_layer.get(0, 0), by_layer.get(2, 0))
    else:
        assert len({count for name, count in gone.items() if sizes[name].kind == "mlp"}) == 1


def test_points_are_interpolated_and_continued_along_the_last_line():
    curve = GroupCurve("g", "mlp", 0, 100, (Point(10, 1.0), Point(20, 3.0)))
    assert [curve.at(n) for n in (0, 5, 10, 15, 30)] == [0, 0.5, 1.0, 2.0, 5.0]
    assert GroupCurve("g", "mlp", 0, 100, (Point(10, 1.0),)).at(30) == 3.0


def test_a_run_that_is_killed_goes_on_with_the_points_it_has(source, text, measured, tmp_path, monkeypatch):
    real, seen = Trials.loss, []

    def loss(trials, kept):
        seen.append(kept)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(trials, kept)

    monkeypatch.setattr(Trials, "loss", loss)
    options = {**OPTIONS, "calibration": text, "kinds": "mlp,attention"}
    with pytest.raises(KeyboardInterrupt):
        api.sensitivity(source, output=tmp_path / "curve.json", **options)
    with pytest.raises(OutputError, match="interrupted run with other settings"):
        api.sensitivity(source, output=tmp_path / "curve.json", **{**options, "seed": 1})
    found = api.sensitivity(source, output=tmp_path / "curve.json", **options)
    points = sum(len(group.points) for group in found.groups)
    assert found == measured[1] and len(seen) == 4 + points - 3


def test_points_measured_with_other_text_of_a_method_are_not_used(source, tmp_path, text_of_method, monkeypatch):
    """No setting of the command names the text."""
    text, file = text_of_method(Fast), tmp_path / "curve.json"

    def stopped(*_):
        raise KeyboardInterrupt

    options = {"shares": "0.5", "samples": 2, "length": 16}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trials, "loss", stopped)
        api.sensitivity(source, output=file, **options)
    text.write_text("The brown quick fox jumps. " * 40)
    with pytest.raises(OutputError, match="interrupted run with other settings"):
        api.sensitivity(source, output=file, **options)
    text.write_text("The quick brown fox jumps. " * 40)
    api.sensitivity(source, output=file, **options)


def test_a_curve_of_another_model_and_a_wrong_file_are_refused_before_work(source, measured, tmp_path):
    file, _ = measured
    found = json.loads(file.read_text())

    def planned(**changes):
        (tmp_path / "other.json").write_text(json.dumps({**found, **changes}))
        options = {"ratio": 0.1, "importance": "l2", "shape": "free", "allocation": "curve", "layers": "all"}
        return api.plan(source, **options, settings={"curve": {"file": str(tmp_path / "other.json")}})

    mlp = [group for group in found["groups"] if group["kind"] == "mlp"]
    with pytest.raises(SelectionError, match=r"has no curve of '.*0.*'; measure it"):
        planned(groups=mlp[1:])
    with pytest.raises(SelectionError, match=r"another model: .* had 47 units there and has 48"):
        planned(groups=[{**group, "units": 47} for group in mlp])
    with pytest.raises(SettingsError, match="not written by `llmpruner sensitivity`"):
        planned(version=2)
    with pytest.raises(SettingsError, match="leave --steps out"):
        api.plan(source, ratio=0.1, importance="l2", shape="free", allocation="curve", steps=2,
                 settings={"curve": {"file": str(file)}})  # fmt: skip
    with pytest.raises(SettingsError, match=r"needs a curve: --set curve\.file=FILE"):
        api.plan(source, ratio=0.1, importance="l2", shape="free", allocation="curve")


def test_a_curve_of_another_model_is_used_with_a_warning(source, measured, tmp_path, caplog):
    file, _ = measured
    shutil.copytree(source, tmp_path / "copied")
    shutil.copytree(source, tmp_path / "tuned")
    tiny_models.llama(layers=3, seed=1).save_pretrained(tmp_path / "tuned")
    shutil.copytree(source, tmp_path / "biased")
    biased = tiny_models.llama(layers=3)
    type(biased)(type(biased.config)(**{**biased.config.to_dict(), "attention_bias": True})).save_pretrained(
        tmp_path / "biased"
    )

    def warned(model, curve=file, **options):
        caplog.clear()
        options = {"importance": "l2", **options}
        api.plan(
            model, ratio=0.1, shape="free", allocation="curve", settings={"curve": {"file": str(curve)}}, **options
        )
        return [record.getMessage() for record in caplog.records if "curve.json" in record.getMessage()]

    assert warned(source) == warned(tmp_path / "copied") == []
    (line,) = warned(tmp_path / "tuned")
    assert line == f"{file} was measured on '{source}', whose files are not those of '{tmp_path / 'tuned'}'"
    (line,) = warned(tmp_path / "biased")
    assert f"on '{source}', whose parameters differ in name or shape from those of '{tmp_path / 'biased'}'" in line
    (line,) = warned(source, importance="l1")
    assert line == f"{file} was measured with the criterion l2, and this prune has l1"
    (line,) = warned(source, compensate="refit", samples=2, length=16)
    assert line == f"{file} was measured with the compensation none, and this prune has refit"
    # A file of before, which has the name of the model alone; a model in memory may not be that of its files.
    values = json.loads(file.read_text())
    del values["measured"]["structure"], values["measured"]["files"]
    earlier = tmp_path / "earlier-curve.json"
    earlier.write_text(json.dumps(values))
    assert warned(source, earlier) == []
    assert warned(tmp_path / "tuned", earlier) == [
        f"{earlier} was measured on '{source}', and this is '{tmp_path / 'tuned'}'"
    ]
    assert warned(api.load(source)) == []
    assert len(warned(api.load(tmp_path / "tuned"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": "0.5,0.25"}, "--shares must ascend"),
        ({"kinds": "layer"}, "--kinds layer alone is one group"),
        ({"shares": "0.001"}, "less than one unit of the selected groups"),
        ({"output": "curve.txt"}, "name a .json file"),
        ({"restart": True}, "restart has no effect without an output"),
    ],
)
def test_mistakes_are_refused_before_weights_are_read(source, text, options, message, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", None)
    with pytest.raises(LlmprunerError, match=message):
        api.sensitivity(source, **{**OPTIONS, "calibration": text, **options})
