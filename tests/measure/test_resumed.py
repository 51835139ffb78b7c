"""Rankings and comparisons that go on from a log of what is finished."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys

import pytest
import torch
from nets import NETS
from places import ROOT
from plans import net_of
from rankings import FEW, STATIC, ranked
from runs import HEAD, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import ExecutionError, QRecipeWarning
from qrecipe.measure.compare.run import Run
from qrecipe.model.digest import value_digest
from qrecipe.pool.log import Owner, open_pieces

TWICE = {"forward": lambda model, batch: (model(batch), model(-batch))}


def job(count):
    """A model with five sites, and batches."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in "abcde"}
    source = torch.Generator().manual_seed(0)
    model = net_of(through, **layers)
    return model, [torch.randn(4, 8, generator=source) for _ in range(count)]


def through(self, x):
    return self.e(self.d(self.c(self.b(self.a(x))).relu()))


class Counting:
    """A measure that counts its calls, and is interrupted at one of them."""

    def __init__(self, stop=math.inf):
        self.stop = stop
        self.calls = 0

    def counted(self):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt


class Metric(Counting):
    def __call__(self, output, reference):
        self.counted()
        return -float((output - reference).abs().max())


class Evaluation(Counting):
    def __call__(self, model):
        self.counted()
        return -float(model(torch.ones(2, 8)).square().mean())


def keys_of(log):
    """What a log has, in the order in which it was finished."""
    return [key for line in log.read_text().splitlines()[1:] for key in json.loads(line)]


def without_times(comparison):
    sites = [(site.name, site.weight, site.activation) for site in comparison.sites]
    return sites, comparison.output, comparison.batches


@pytest.mark.parametrize("options", [{}, TWICE], ids=["one call", "two calls"])
@pytest.mark.parametrize("stop", every(2, [9, 16]))
def test_an_interrupted_ranking_goes_on_and_measures_only_what_is_left(tmp_path, stop, options):
    (model, batches), log = job(3), tmp_path / "log"
    whole = ranked(model, batches, metric=Metric(), **options)
    with pytest.warns(QRecipeWarning, match="QR212"):
        ranked(model, batches, metric=Metric(stop), resume=log, **options)
    names = {site.name for site in whole.sites}
    left = [names.difference(key[2:] for key in keys_of(log) if key[0] == at) for at in "012"]
    second = Metric()
    assert ranked(model, batches, metric=second, resume=log, **options) == whole
    calls = 2 if options else 1
    assert second.calls == sum(calls * (1 + len(some)) for some in left if some)  # 1: float
    assert 0 < sum(map(len, left)) < 3 * len(names)
    sites = [key for key in keys_of(log) if key[2:]]
    assert sorted(sites) == sorted(f"{at} {name}" for at in "012" for name in names)


def test_an_interrupted_evaluation_of_sites_goes_on(tmp_path):
    (model, batches), log = job(2), tmp_path / "log"
    counting, second = Evaluation(), Evaluation()
    whole = ranked(model, batches, evaluate=counting)
    with pytest.warns(QRecipeWarning, match="QR212"):
        ranked(model, batches, evaluate=Evaluation(4), resume=log)
    assert ranked(model, batches, evaluate=second, resume=log) == whole
    assert second.calls == counting.calls - 3


def test_an_interrupted_comparison_goes_on_and_runs_only_what_is_left(tmp_path, monkeypatch):
    (model, batches), log = job(4), tmp_path / "log"
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    whole = qrecipe.compare(model, converted, batches, progress=silent)
    seen, run = [], Run.part

    def part(self, batch, index):
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return run(self, batch, index)

    monkeypatch.setattr(Run, "part", part)
    with pytest.raises(KeyboardInterrupt):
        qrecipe.compare(model, converted, batches, progress=silent, resume=log)
    again = qrecipe.quantize(model, STATIC, batches, progress=silent)  # as another process would
    shown = []
    resumed = qrecipe.compare(
        model, again, iter(batches), progress=lambda *at: shown.append(at), resume=log
    )
    assert without_times(resumed) == without_times(whole)
    assert seen == [0, 1, 2, 2, 3]
    assert [done for done, _ in shown] == [1, 2, 3, 4]


def test_progress_counts_what_is_known(tmp_path):
    (model, batches), log = job(3), tmp_path / "log"
    with pytest.warns(QRecipeWarning, match="QR212"):
        ranked(model, batches, metric=Metric(9), resume=log)
    shown, measure = [], {"metric": Metric(), "resume": log}
    qrecipe.sensitivity(model, STATIC, batches, progress=lambda *at: shown.append(at), **measure)
    measured = [done for done, total in shown if total == shown[-1][1]]
    assert measured == list(range(1, shown[-1][1] + 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A ranking that has ended, and its log."""
    model, batches = job(2)
    log = tmp_path_factory.mktemp("finished") / "log"
    return model, batches, ranked(model, batches, resume=log), log.read_bytes()


@pytest.mark.parametrize("at", every(8, range(1, 24)))
def test_a_log_that_ends_anywhere_after_its_first_line_is_gone_on_from(tmp_path, finished, at):
    model, batches, whole, data = finished
    log = tmp_path / "log"
    head = data.index(b"\n") + 1
    log.write_bytes(data[: head + (len(data) - head) * at // 24])
    assert ranked(model, batches, resume=log) == whole
    assert sorted(log.read_bytes().splitlines()) == sorted(data.splitlines())


def test_a_line_without_its_end_is_not_a_line(tmp_path, finished):
    model, batches, whole, data = finished
    log = tmp_path / "log"
    log.write_bytes(data[:-1])
    assert ranked(model, batches, resume=log) == whole
    assert log.read_bytes() == data


def test_an_empty_file_is_a_new_log(tmp_path, finished):
    model, batches, whole, data = finished
    (tmp_path / "log").touch()
    assert ranked(model, batches, resume=tmp_path / "log") == whole
    assert (tmp_path / "log").read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["log"]


def test_numbers_in_a_log_are_the_same_to_the_bit(tmp_path):
    owner, log = Owner("numbers", {}, {}), tmp_path / "log"
    source = random.Random(0)
    numbers = [struct.unpack("d", source.randbytes(8))[0] for _ in range(1000)]
    numbers = [each for each in numbers if each == each]
    numbers += [0.0, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308]
    open_pieces(log, owner, list[float]).note({"all": numbers})
    found = open_pieces(log, owner, list[float]).kept["all"]
    assert [struct.pack("d", each) for each in found] == [struct.pack("d", n) for n in numbers]
    open_pieces(log, owner, list[float]).note({"none": [math.nan]})
    assert math.isnan(open_pieces(log, owner, list[float]).kept["none"][0])


def refused(call, code="QR331"):
    with pytest.raises(ExecutionError) as raised:
        call()
    (finding,) = raised.value.findings
    assert finding.code == code
    return finding.message.partition(" is the log of ")[2] if code == "QR331" else finding.message


def test_the_log_of_another_recipe_model_or_data_is_refused(tmp_path, finished):
    model, batches, _, data = finished
    log = tmp_path / "log"
    log.write_bytes(data)
    other = qrecipe.parse_recipe(f'{HEAD}{FEW}[tensor.activation]\nobserver = "minmax"\n')
    assert refused(lambda: ranked(model, batches, other, resume=log)) == (
        "a ranking for another recipe"
    )
    trained, _ = job(0)
    with torch.no_grad():
        trained.e.bias[0] += 1
    assert refused(lambda: ranked(trained, batches, resume=log)) == "a ranking for another model"
    for some in (batches[:1], batches[::-1], [batches[0], batches[1] + 1]):
        assert refused(lambda some=some: ranked(model, some, resume=log)) == (
            "a ranking for other batches"
        )
    assert log.read_bytes() == data


def test_the_log_of_a_model_with_other_code_is_refused(tmp_path):
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    batches = [torch.randn(4, 8)]
    plain = net_of(lambda self, x: self.b(self.a(x)), **layers)
    ranked(plain, batches, resume=tmp_path / "log")
    summed = net_of(lambda self, x: self.b(self.a(x) + x), **layers)
    assert refused(lambda: ranked(summed, batches, resume=tmp_path / "log")) == (
        "a ranking for other sites"
    )
    turned = net_of(lambda self, x: self.a(self.b(x)), **layers)
    assert refused(lambda: ranked(turned, batches, resume=tmp_path / "log")) == (
        "a ranking for other sites"
    )


def norm(model):
    return float(sum(each.detach().square().sum() for each in model.parameters()))


def worst(output, reference):
    return -float((output - reference).abs().max())


def run(model, batch):
    return model(batch)


def test_the_log_of_other_functions_or_of_another_target_is_refused(tmp_path, finished):
    model, batches, _, data = finished
    log = tmp_path / "log"
    log.write_bytes(data)
    for options, functions in (
        ({"metric": worst}, "metric worst"),
        ({"evaluate": norm}, "evaluate norm"),
        ({"forward": run}, "forward run"),
        ({"metric": worst, "forward": run}, "metric worst, forward run"),
    ):
        assert refused(lambda options=options: ranked(model, batches, resume=log, **options)) == (
            f"a ranking with functions none instead of {functions}"
        )
    assert refused(lambda: ranked(model, batches, resume=log, target_cpu="vnni")) == (
        "a ranking with target CPU this instead of vnni"
    )


@pytest.mark.parametrize("what", ["torch", "qrecipe", "Python", "CPU", "threads"])
def test_the_log_of_another_environment_is_refused(tmp_path, monkeypatch, finished, what):
    model, batches, _, data = finished
    log = tmp_path / "log"
    log.write_bytes(data)
    head = json.loads(data.partition(b"\n")[0])
    then = head["owner"]["settings"][what]
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    else:
        from qrecipe.measure import owner

        environment = {**owner.environment(), what: "99"}
        monkeypatch.setattr(owner, "environment", lambda: environment)
    assert refused(lambda: ranked(model, batches, resume=log)) == (
        f"a ranking with {what} {then} instead of 99"
    )


def test_the_log_of_other_settings_of_torch_is_refused(tmp_path, finished):
    model, batches, _, data = finished
    log = tmp_path / "log"
    log.write_bytes(data)
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        said = refused(lambda: ranked(model, batches, resume=log))
    finally:
        torch.set_float32_matmul_precision(former)
    assert said == f"a ranking with float32 matmul precision {former} instead of medium"


def test_the_log_of_another_comparison_is_refused(tmp_path, finished):
    model, batches, _, data = finished
    log, ranking = tmp_path / "log", tmp_path / "ranking"
    ranking.write_bytes(data)
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)

    def compared(converted, batches=batches, log=log):
        return qrecipe.compare(model, converted, batches, progress=silent, resume=log)

    compared(converted)
    assert refused(lambda: compared(converted, log=ranking)) == ("a ranking, not of a comparison")
    assert refused(lambda: ranked(model, batches, resume=log)) == ("a comparison, not of a ranking")
    assert refused(lambda: compared(converted, batches[:1])) == "a comparison for other batches"
    otherwise = qrecipe.quantize(model, STATIC, [2 * each for each in batches], progress=silent)
    assert refused(lambda: compared(otherwise)) == "a comparison for another converted model"


DAMAGED = {
    "no log": b"what I found\n",
    "a trial log": b'{"format": 3}\n',
    "no whole line": b'{"format": 1',
    "another format": b'{"format": 2, "owner": {"work": "", "digests": {}, "settings": {}}}\n',
    "no owner": b'{"format": 1}\n',
    "no JSON": b"HEAD[\n",
    "a list": b"HEAD[1]\n",
    "no parts": b'HEAD{"0 a": []}\n',
    "a number": b'HEAD{"0 a": [1.5]}\n',
    "text for a number": b'HEAD{"0 a": [{"sums": [{"signal": "1"}]}]}\n',
    "a hole": b"HEAD\0\0\0\0\n",
    "too deep": b"HEAD" + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_log_of_pieces_is_a_finding_and_stays(tmp_path, finished, kind):
    model, batches, _, data = finished
    log = tmp_path / "log"
    text = DAMAGED[kind].replace(b"HEAD", data[: data.index(b"\n") + 1])
    log.write_bytes(text)
    message = refused(lambda: ranked(model, batches, resume=log), "QR332")
    line = 2 if b"HEAD" in DAMAGED[kind] else 1
    assert f"is not a log of pieces: line {line}: " in message
    assert log.read_bytes() == text


@pytest.mark.parametrize("size", [0, 1, 30, -1])
def test_a_log_of_which_only_a_torn_first_line_is_there_is_begun_anew(tmp_path, finished, size):
    data = finished[3]
    first = data[: data.index(b"\n") + 1]
    log = tmp_path / "log"
    log.write_bytes(first[:size])
    owner = Owner("a ranking", json.loads(first)["owner"]["digests"], {})
    assert open_pieces(log, owner, float).kept == {}
    assert log.read_bytes().endswith(b"}\n")
    log.write_bytes(first[:20] + b"\n")
    refused(lambda: open_pieces(log, owner, float), "QR332")


def test_a_log_that_cannot_be_written_is_a_finding_before_anything_is_measured(tmp_path):
    (model, batches), metric = job(1), Metric()
    for place in (tmp_path, tmp_path / "none" / "log"):
        message = refused(
            lambda at=place: ranked(model, batches, metric=metric, resume=at), "QR332"
        )
        assert "cannot be used" in message
    assert not metric.calls


def test_a_log_that_is_gone_is_a_finding(tmp_path):
    log = tmp_path / "log"

    def removing(output, reference):
        log.unlink(missing_ok=True)
        return 0.0

    message = refused(lambda: ranked(*job(1), metric=removing, resume=log), "QR332")
    assert "cannot be written: no such file" in message


def test_arguments_that_do_not_go_with_a_log_are_refused(tmp_path):
    model, batches = job(1)
    with pytest.raises(ExecutionError, match="QR425 an estimate is a single pass: resume needs"):
        ranked(model, batches, method="estimate", resume=tmp_path / "log")

    class Handle:
        def __reduce__(self):
            raise TypeError("a handle of this process")

    held = [(batch, Handle()) for batch in batches]
    with pytest.raises(ExecutionError, match="QR425 resume cannot tell batch 0 from another"):
        ranked(model, held, forward=lambda net, batch: net(batch[0]), resume=tmp_path / "log")


@pytest.mark.parametrize("name", every(13, sorted(NETS)))
def test_half_a_log_gives_what_no_log_gives(tmp_path, name):
    model, batches = NETS[name].model(), NETS[name].batches(2)
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    whole = ranked(model, batches)
    compared = without_times(qrecipe.compare(model, converted, batches, progress=silent))
    for _ in range(2):
        assert ranked(model, batches, resume=tmp_path / "ranking") == whole
        found = qrecipe.compare(
            model, converted, batches, progress=silent, resume=tmp_path / "comparison"
        )
        assert without_times(found) == compared
        for log in tmp_path.iterdir():
            lines = log.read_bytes().splitlines(keepends=True)
            log.write_bytes(b"".join(lines[: 1 + len(lines) // 2]))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(2), "z": "text"},
        {"x": torch.ones(2), "y": "other"},
        {"x": torch.ones(2, dtype=torch.float64), "y": "text"},
        {"x": torch.ones(1, 2), "y": "text"},
        {"x": -torch.ones(2), "y": "text"},
        {"y": "text", "x": torch.ones(2)},
        [torch.ones(2), "text"],
    ],
)
def test_batches_are_told_apart_by_all_that_is_in_them(other):
    value = {"x": torch.ones(2), "y": "text"}
    assert value_digest(value) == value_digest({"x": torch.ones(4)[:2], "y": "te" + "xt"})
    assert value_digest(other) != value_digest(value)


IN_A_PROCESS = """
import os, signal, sys
import torch
from rankings import ranked
from test_resumed import job

torch.set_num_threads(1)
fatal, log, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
calls = []

def metric(output, reference):
    calls.append(0)
    if len(calls) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return -float((output - reference).abs().max())

ranking = ranked(*job(3), metric=metric, resume=log or None)
with open(out, "w") as file:
    file.write(f"{len(calls)}\\n{ranking.to_json()}")
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_in_another_one(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    places = [str(ROOT / each) for each in ("", "tests/support", "tests/measure")]

    def ended(fatal, log):
        """Whether the process, which is killed at this call, has ended by itself."""
        words = [sys.executable, "-c", IN_A_PROCESS, str(fatal), str(log), str(out)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        return subprocess.run(words, env=env, timeout=300, check=False).returncode == 0

    assert ended(0, "")
    calls, whole = out.read_text().split("\n", 1)
    assert not ended(9, log)
    assert len(keys_of(log)) == 8
    assert not ended(9, log)
    known = {key for key in keys_of(log) if key[2:]}
    assert ended(0, log)
    again, resumed = out.read_text().split("\n", 1)
    assert resumed == whole
    assert int(again) == 3 * 5 - len(known) + 1  # 1: the float model on the last batch
    assert int(calls) == 3 * 6
