"""One recipe through the runtimes that are installed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from nets import NETS
from plans import recipe
from runs import silent
from torch import nn

import qrecipe
from qrecipe.deployment import verdict
from qrecipe.deployment.bench import race
from qrecipe.deployment.job import Job
from qrecipe.deployment.sites import sites_alone
from qrecipe.deployment.verdict import Distances, verdict_of, verdict_of_float
from qrecipe.deployment.ways import WAYS, commands
from qrecipe.errors.findings import AuditError, CalibrationError, ExecutionError, QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.planning.cpu import has_vnni
from qrecipe.recipe.overlay import for_executorch
from qrecipe.runtimes import onnxruntime, table
from qrecipe.runtimes.session import ModuleSession
from qrecipe.runtimes.table import RUNTIMES

pytestmark = pytest.mark.usefixtures("onnx_listed_once")

NET = NETS["residual"]
STATIC = recipe(base="builtin:x86-static-minmax")
VNNI = recipe(base="builtin:x86-vnni-static-minmax")


def bench_of(*runtimes, a_recipe=STATIC, **options):
    given = {"runtimes": runtimes, "progress": silent, **options}
    return qrecipe.bench(NET.model(), a_recipe, NET.batches(10), **given)


def row_of(result, title):
    return next(row for row in result.rows if row.title == title)


@pytest.fixture(scope="module")
def benched():
    """ONNX Runtime and OpenVINO, with the calls of an evaluation."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    sizes = []

    def mean(model):
        sizes.append(len(model(torch.ones(7, 3, 8, 8))))
        return model(NET.batches(1)[0]).mean().item()

    threads, model = torch.get_num_threads(), NET.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = qrecipe.bench(
        model,
        STATIC,
        NET.batches(10),
        runtimes=["onnxruntime", "openvino"],
        evaluate=mean,
        batch_size=2,
        progress=silent,
    )
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert sizes == [7] * len(result.rows)
    return result


def test_each_runtime_has_a_float_and_an_int8_row_beside_torchs_float_model(benched):
    assert [row.title for row in benched.rows] == [
        "torch float",
        *("ONNX Runtime float", "ONNX Runtime int8", "OpenVINO float", "OpenVINO int8"),
    ]
    for row in benched.rows:
        assert row.verdict == "ok"
        assert row.time.seconds > 0
        assert row.nbytes > 1000
        assert row.metric == pytest.approx(benched.rows[0].metric, abs=0.1)
        if row.precision == "float":
            assert row.distances.output > 80
        else:
            assert row.distances.from_reference > 30
            assert abs(row.distances.output - row.distances.reference) < 6
            assert row.kernels.planned > 3
            assert row.kernels.in_float == ()
            assert sum(row.kernels.operations.values()) > 3


def test_the_fastest_is_named_with_the_command_that_writes_its_file(benched):
    assert benched.fastest.time.seconds == min(row.time.seconds for row in benched.rows)
    assert benched.fastest_int8.precision == "int8"
    text = str(benched)
    assert f"Fastest: {benched.fastest.title}" in text
    command = "qrecipe export RECIPE --model FILE.py:NAME --data FILE.py:NAME --to "
    assert f"\n  {command}" in text
    assert "CPU time of one call" in text
    assert "1 thread" in text
    assert "[2, 3, 8, 8]" in text


def test_the_result_is_json_and_html(benched):
    document = json.loads(benched.to_json())
    assert [row["verdict"] for row in document["rows"]] == ["ok"] * 5
    assert document["metric"] == "mean"
    assert document["rows"][2]["kernels"]["operations"]["QLinearConv"] > 3
    assert document["rows"][0]["db"]["output"] is None  # infinite
    assert ">OpenVINO</td>" in benched._repr_html_()
    assert hash(benched) == hash(replace(benched))


def only(monkeypatch, *titles):
    """Let a bench try these alone."""
    ways = tuple(way for way in WAYS if way.title in titles)
    monkeypatch.setattr("qrecipe.deployment.bench.WAYS", ways)


@pytest.mark.slow
def test_a_runtime_that_computes_otherwise_is_an_audit_error_of_its_row(monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    only(monkeypatch, "torch float", "ONNX Runtime int8")
    run = onnxruntime.OnnxRuntimeSession.run

    def saturated(self, inputs):
        found = run(self, inputs)
        if self.source is None:  # the file as it is written, which is right
            return found
        return [each.clamp(max=each.max() / 3) for each in found]

    monkeypatch.setattr(onnxruntime.OnnxRuntimeSession, "run", saturated)
    result = bench_of("onnxruntime")
    row = row_of(result, "ONNX Runtime int8")
    assert row.verdict == "QR411"  # each site alone is wrong too
    assert row.time is not None
    assert row not in (result.fastest, result.fastest_int8)
    assert "QR411 the kernel of ONNX Runtime int8 of conv1" in str(result)
    with pytest.raises(AuditError, match="QR411 the kernel of ONNX Runtime int8 of conv1"):
        result.check()


@pytest.fixture(scope="module")
def planned():
    job = Job.of(NET.model(), VNNI, NET.batches(10), None, None, None)
    return job.planned(job.recipe)


RIGHT = {"conv1": 50.0, "fc": 60.0}


@pytest.mark.parametrize(
    ("near", "own", "expected", "code"),
    [
        (31.0, 20.0, 35.0, None),  # near the reference
        (25.0, 36.0, 35.0, None),  # nearer to float than the reference
        (25.0, 30.0, 35.0, None),  # roundings that add up
        (25.0, 28.0, 35.0, "QR414"),
        (math.nan, math.nan, 35.0, "QR414"),
        (5.0, 3.0, 12.0, None),  # the plan is too coarse to judge by
        (math.nan, math.nan, 9.0, "QR414"),
        (None, None, None, None),  # no floating tensor
    ],
)
@pytest.mark.parametrize("alone", [None, lambda: RIGHT, lambda: 1 / 0])
def test_outputs_are_held_to_the_bounds_of_the_audit(near, own, expected, code, alone, planned):
    found = verdict_of("OpenVINO int8", Distances(near, own, expected), planned, alone)
    assert [finding.code for finding in found.findings] == ([] if code is None else [code])


def test_sites_are_judged_alone_only_where_the_output_differs(planned):
    judged = Distances(25.0, 33.0, 35.0)
    assert verdict_of("x", judged, planned, lambda: RIGHT).farthest == ("conv1", 50.0)
    near = Distances(45.0, 33.0, 35.0)
    assert verdict_of("x", near, planned, lambda: 1 / 0).farthest is None


def test_a_wrong_kernel_is_named_and_one_that_saturates_for_lack_of_vnni(planned, monkeypatch):
    def look():
        found = Distances(12.0, 11.0, 35.0)
        return verdict_of("OpenVINO int8", found, planned, lambda: {**RIGHT, "fc": 12.0}).findings

    (wrong,) = look()
    assert wrong.code == "QR411"
    assert wrong.message.startswith("the kernel of OpenVINO int8 of fc (Linear) computes")
    monkeypatch.setattr(verdict, "has_vnni", lambda: False)
    (saturated,) = look()
    assert saturated.code == "QR416"
    assert "fc, 12.0 dB from the plan at worst" in saturated.message
    assert "reduce_range = true" in saturated.hint


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sites_run_alone_in_a_runtime(planned, runtime, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip(runtime)
    found = sites_alone(planned, runtime)
    in_plan = {site.name for site in planned.compiled.plan.sites if site.verdict == "quantized"}
    assert in_plan <= found.keys()
    assert min(found.values()) > 30


def test_a_float_runtime_that_is_not_the_model_is_found():
    (finding,) = verdict_of_float("OpenVINO float", Distances(None, 20.0, None)).findings
    assert finding.code == "QR414"
    assert verdict_of_float("OpenVINO float", Distances(None, 90.0, None)).findings == ()


def test_what_fails_is_a_row_with_its_reason(monkeypatch):
    def fails(job, threads):
        raise RuntimeError("no such operator: Foo\nand more")

    ways = [replace(way, make=fails) if way.title == "torch int8" else way for way in WAYS]
    monkeypatch.setattr("qrecipe.deployment.bench.WAYS", tuple(ways))
    result = bench_of("torch")
    row = row_of(result, "torch int8")
    assert (row.verdict, row.failure, row.time) == ("failed", "no such operator: Foo", None)
    assert "torch int8 failed: no such operator: Foo" in str(result)
    assert result.fastest.title == "torch float"
    assert result.fastest_int8 is None
    result.check()


def test_what_is_not_installed_is_a_line_that_names_its_extra(monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda package: None)
    result = bench_of("torch", "onnxruntime", "openvino")
    assert [row.title for row in result.rows] == ["torch float", "torch int8"]
    assert [line.partition("pip")[2] for line in result.missing] == [
        " install 'qrecipe[onnx]'",
        " install 'qrecipe[openvino]'",
    ]
    assert all(line in str(result) for line in result.missing)


def test_arguments_that_do_not_fit_are_said_before_any_work():
    with pytest.raises(ExecutionError, match=r'QR425 there is no runtime "openvin"(?s:.)*openvino'):
        bench_of("openvin")
    scalar = torch.tensor(2.0)
    with pytest.raises(ExecutionError, match="QR425 4 samples are asked for"):
        qrecipe.bench(torch.nn.ReLU(), STATIC, [scalar] * 10, batch_size=4, runtimes=[])
    with pytest.raises(ExecutionError, match="QR423 worse returns a str"):
        bench_of(evaluate=worse)
    with pytest.raises(CalibrationError, match="QR401"):
        qrecipe.bench(NET.model(), STATIC, [])


def worse(model):
    return "good"


def test_commands_ask_for_the_executor_that_was_measured():
    by_fx = recipe(base="builtin:x86-static-minmax", head='executor = "fx"')
    by_pt2e = recipe(base="builtin:x86-static-minmax", head='executor = "pt2e"')
    given = "net.toml --model m.py:f --data m.py:d"
    found = commands(given, by_fx, is_for_vnni=False)
    assert found["torch int8"] == f"qrecipe quantize {given} --out model.safetensors"
    assert found["ONNX Runtime int8"] == f"qrecipe export {given} --to onnx --out model.onnx"
    assert f"{given} --executor pt2e --to aoti" in found["torch.compile int8"]
    assert "--executor fx" in commands(given, by_pt2e, is_for_vnni=False)["torch int8"]
    assert "--executor" not in "".join(commands(given, STATIC, is_for_vnni=False).values())
    vnni = commands(given, VNNI, is_for_vnni=True)
    assert "--target-cpu vnni" in vnni["OpenVINO int8"]
    assert "--target-cpu" not in vnni["torch int8"]


def test_a_recipe_that_trains_is_measured_and_names_no_command():
    trained = recipe(base="builtin:x86-static-minmax", head='phase = "qat"')
    result = bench_of("torch", a_recipe=trained)
    assert row_of(result, "torch int8").verdict == "ok"
    assert result.commands == {}
    assert "The recipe trains: export the trained model" in str(result)
    assert "qrecipe export" not in str(result)


def test_a_recipe_that_transforms_the_model_is_held_to_the_callers_float_model():
    changed = recipe('[transform.equalize]\nby = "weights"\n', base="builtin:x86-static-minmax")
    result = bench_of("torch", a_recipe=changed)
    row = row_of(result, "torch int8")
    assert row.verdict == "ok"
    assert row.distances.output > 25


def test_a_recipe_for_x86_is_made_one_for_executorch():
    made = for_executorch(STATIC)
    assert (made.backend, made.executor) == ("executorch", "pt2e")
    assert made.tensors["activation"].dtype == "int8"
    assert made.tensors["activation"].reduce_range is False
    assert made.tensors["weight"].quant_min == -127
    assert for_executorch(made) is made
    plan = qrecipe.plan(NET.model(), made, NET.batches(1)[0])
    assert sum(site.verdict == "quantized" for site in plan) > 5


def test_sessions_take_turns_and_each_call_has_its_own_inputs():
    order = []

    class Doubling(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append((self.name, x.sum().item()))
            return x.mul_(2)

    x = torch.ones(3)
    sessions = {name: ModuleSession(Doubling(name)) for name in "ab"}
    times = race(sessions, Inputs((x,)), 1)
    assert order[:4] == [("a", 3.0), ("b", 3.0)] * 2
    assert {total for _, total in order} == {3.0}
    assert len(times["a"]) == len(times["b"]) >= 7


def test_a_recipe_that_does_not_fit_the_model_ends_the_bench():
    with pytest.raises(QRecipeError, match="QR301"):
        bench_of("torch", a_recipe=recipe('[rules.module_name]\n"nowhere" = "float"\n'))


@pytest.mark.slow
def test_every_runtime_computes_what_was_planned():
    pytest.importorskip("torchao")
    result = bench_of("torch", "inductor", *([] if missing_executorch() else ["executorch"]))
    assert result.failures == ()
    result.check()
    compiled = row_of(result, "torch.compile int8")
    assert compiled.kernels.planned == 6
    assert compiled.nbytes > 1000
    assert row_of(result, "torch.compile float").nbytes is None


def missing_executorch():
    try:
        RUNTIMES["executorch"].check()
    except QRecipeError:
        return True
    return False


@pytest.mark.cpu
@pytest.mark.slow
def test_kernels_of_openvino_that_saturate_on_this_cpu_are_found():
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(768, 256), nn.ReLU()).eval(), torch.rand(16, 768)
    result = qrecipe.bench(model, VNNI, [x] * 10, runtimes=["openvino"], progress=silent)
    row = row_of(result, "OpenVINO int8")
    assert row.verdict == ("ok" if has_vnni() else "QR416")
