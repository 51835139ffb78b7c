"""What torch's tools for saving, exporting and measuring do, and what qrecipe does instead."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from nets import NETS
from plans import net_of
from runs import STATIC, silent
from torch import nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig
from torch.ao.quantization._correct_bias import bias_correction
from torch.ao.quantization._equalize import equalize
from torch.ao.quantization.fx._equalize import default_equalization_qconfig
from torch.ao.quantization.fx._model_report.detector import PerChannelDetector
from torch.ao.quantization.quantize_fx import (
    _convert_to_reference_decomposed_fx,
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
)

import qrecipe
from qrecipe import _torch_ao
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import ArtifactError

EIGHT = get_default_qconfig("x86")
IMAGES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture(autouse=True)
def _without_notices():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def net():
    torch.manual_seed(0)
    return net_of(
        lambda self, x: self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        fc=nn.Linear(4, 4),
    ).eval()


def by_torch(model, mapping=None):
    """The model prepared and calibrated, and converted from a copy of that."""
    mapping = mapping or QConfigMapping().set_global(EIGHT)
    prepared = prepare_fx(copy.deepcopy(model), mapping, (IMAGES[0],))
    for batch in IMAGES:
        prepared(batch)
    return prepared, convert_fx(copy.deepcopy(prepared))


def by_qrecipe(model, recipe=STATIC):
    return qrecipe.quantize(model, recipe, IMAGES, progress=silent)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


# --- saving


def test_torch_saves_a_converted_model_that_it_cannot_load_and_here_a_file_gives_it_back(tmp_path):
    model = net()
    _, converted = by_torch(model)
    file = saved(converted)
    with pytest.raises(AttributeError, match="_modules"):
        torch.load(file, weights_only=False)(IMAGES[0])
    ours = by_qrecipe(model)
    qrecipe.save_quantized(ours, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(IMAGES[0]), ours(IMAGES[0]))


def test_a_pickled_model_that_has_lost_its_sites_is_not_stored(tmp_path):
    model = NETS["mlp"].model()
    converted = qrecipe.quantize(model, STATIC, NETS["mlp"].batches(10), progress=silent)
    again, x = torch.load(saved(converted), weights_only=False), NETS["mlp"].batches(1)[0]
    assert torch.equal(again(x), converted(x))
    with pytest.raises(ArtifactError, match=r"QR511 .* it was pickled(?s:.)*store the model that"):
        qrecipe.save_quantized(again, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_prepared_model_cannot_be_pickled_and_its_state_dict_comes_back():
    model = net()
    compiled = qrecipe.compile(model, STATIC, IMAGES[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, IMAGES, progress=silent)
    with pytest.raises((AttributeError, TypeError)):
        saved(by_torch(model)[0])
    again = compiled.prepare()
    again.load_state_dict(torch.load(saved(prepared.state_dict())))
    batch = IMAGES[1]
    before = {name: value.clone() for name, value in again.state_dict().items()}
    assert torch.equal(compiled.convert(again)(batch), compiled.convert(prepared)(batch))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_torch_loads_a_state_dict_into_another_recipe_and_here_the_file_has_its_own(tmp_path):
    model = net()
    _, first = by_torch(model)
    per_tensor = QConfigMapping().set_global(get_default_qconfig("qnnpack"))
    _, other = by_torch(model, per_tensor)
    result = other.load_state_dict(first.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    qrecipe.save_quantized(by_qrecipe(model), tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net())
    assert qrecipe.provenance(loaded).fingerprint == qrecipe.load_recipe(STATIC).fingerprint
    other_net = net_of(lambda self, x: self.fc(x.mean((2, 3))), fc=nn.Linear(3, 4)).eval()
    with pytest.raises(ArtifactError, match="QR507"):
        qrecipe.load_quantized(tmp_path / "net.safetensors", other_net)


# --- exporting


def test_torch_exports_neither_the_converted_nor_the_reference_model_but_the_decomposed_one():
    prepared, converted = by_torch(net())
    for model in (converted, convert_to_reference_fx(copy.deepcopy(prepared))):
        with pytest.raises(Exception, match=r".+"):
            torch.export.export(model, (IMAGES[0],))
    decomposed = _convert_to_reference_decomposed_fx(copy.deepcopy(prepared))
    exported = torch.export.export(decomposed, (IMAGES[0],)).module()
    assert sqnr_db(converted(IMAGES[0]), exported(IMAGES[0])) > 30


def test_torchs_onnx_exporter_fails_on_a_converted_model_and_here_one_route_is_taken(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = net()
    with pytest.raises(Exception, match=r".+"):
        torch.onnx.export(by_torch(model)[1], (IMAGES[0],), tmp_path / "torch.onnx", verbose=False)
    compiled = qrecipe.compile(model, STATIC, IMAGES[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, IMAGES, progress=silent)
    qrecipe.export_onnx(compiled, prepared, tmp_path / "ours.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ours.onnx")
    (given,) = session.get_inputs()
    (output,) = session.run(None, {given.name: IMAGES[0].numpy()})
    assert sqnr_db(compiled.convert(prepared)(IMAGES[0]), torch.from_numpy(output)) > 30


# --- measuring and mending


def nested():
    """A module whose first convolution is fused with what stands behind it."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return net_of(lambda self, x: self.body(x), body=inner).eval()


def test_torchs_report_names_what_is_inside_a_fusion_and_here_reports_name_sites():
    # not at the top: it imports matplotlib.pyplot
    from torch.ao.quantization.fx._model_report.model_report import ModelReport

    model = nested()
    prepared = prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(EIGHT), (IMAGES[0],))
    report = ModelReport(prepared, {PerChannelDetector()})
    report.prepare_detailed_calibration()(IMAGES[0])
    ((_, found),) = report.generate_model_report(False).values()
    assert "body.0.0" in found
    with pytest.raises(AttributeError):
        model.get_submodule("body.0.0")
    ranking = qrecipe.sensitivity(model, STATIC, IMAGES, progress=silent)
    assert {site.name for site in ranking.sites} == {"body.0", "body.3"}
    for site in ranking.sites:
        assert isinstance(model.get_submodule(site.name), nn.Conv2d)


def test_torchs_equalization_keeps_the_function_of_some_pairs_fails_on_others_and_is_not_used():
    def pair(second):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("a", nn.Conv2d(3, 8, 3))
        model.add_module("b", second)
        return model.eval()

    dense = pair(nn.Conv2d(8, 4, 3))
    assert sqnr_db(dense(IMAGES[0]), equalize(dense, [["a", "b"]])(IMAGES[0])) > 100
    with pytest.raises(TypeError):
        equalize(pair(nn.Conv2d(8, 8, 3, groups=8)), [["a", "b"]])
    equalized = prepare_fx(
        pair(nn.Conv2d(8, 4, 3)),
        QConfigMapping().set_global(EIGHT),
        (IMAGES[0],),
        _equalization_config=QConfigMapping().set_global(default_equalization_qconfig),
    )
    assert any("equalization" in name for name, _ in equalized.named_modules())
    compiled = qrecipe.compile(dense, STATIC, IMAGES[0])
    assert not any("equalization" in name for name, _ in compiled.prepare().named_modules())


def test_torchs_bias_correction_leaves_its_shadows_in_a_graph_and_is_not_used():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.second(torch.relu(self.first(x))),
        first=nn.Conv2d(3, 4, 3),
        second=nn.Conv2d(4, 4, 3),
    ).eval()
    _, converted = by_torch(model)
    assert converted.second.bias() is not None
    bias_correction(model, converted, [(batch, 0) for batch in IMAGES])
    with pytest.raises(AttributeError, match="'Shadow' object has no attribute 'bias'"):
        converted.second.bias()


def test_importing_all_of_torchs_quantization_fails_and_here_every_name_is_spelled_out():
    with pytest.raises(AttributeError):
        exec("from torch.ao.quantization import *", {})
    assert hasattr(_torch_ao, "QConfig")
