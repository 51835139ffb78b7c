"""`qrecipe.sensitivity` compared with the loop of PyTorch's tutorial.

The loop prepares, calibrates, converts and runs the model once for each layer, with only that layer
quantized.

Three nets, 4 batches of 16, one thread, CPU time, in one process; the loop is plain torch
(``prepare_fx`` and ``convert_fx``) and runs between the measurements of ours.

    python benchmarks/sensitivity.py                      # ratios and differences, about 4 minutes
    python benchmarks/sensitivity.py --layers cost.svg    # cost against the number of layers
    python benchmarks/sensitivity.py --rankings           # how good other rankings are
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nets import Chain, Encoder, MobileNetV2Like, ResNet18Like, warmed
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qrecipe
from qrecipe.audit.sqnr import Totals
from qrecipe.execution.engine import engine
from qrecipe.execution.executors import executor_of
from qrecipe.execution.part import Task
from qrecipe.measure.sensitivity.rank import sensitivity
from qrecipe.measure.sensitivity.steps import unranked
from qrecipe.model.call import Inputs
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.decide import make_plan
from qrecipe.planning.inventory import inventory_of

RECIPE = qrecipe.parse_recipe(
    'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR201", "QR203", "QR208"]\n'
)
EXACT_DB = 1e-4
SWAPPED_DB = 1e-3
ESTIMATE_SEEDS = 5
ROUNDS = 3
LAYERS = (10, 20, 40, 80)

_TARGETS: dict[str, tuple[Any, ...]] = {
    "add": (torch.add, operator.add),
    "mul": (torch.mul, operator.mul),
    "matmul": (torch.matmul,),
}


@dataclass(frozen=True)
class Net:
    """A model, its batches, and the speedup over the loop that is the goal."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    aim: float


def nets() -> Iterator[Net]:
    images = [torch.randn(16, 3, 64, 64) for _ in range(4)]
    yield Net("ResNet-18-like", warmed(ResNet18Like(), 16, 3, 64, 64), images, 4.0)
    yield Net("MobileNetV2-like", warmed(MobileNetV2Like(), 16, 3, 64, 64), images, 5.0)
    yield Net("encoder", Encoder().eval(), [torch.randn(16, 64, 192) for _ in range(4)], 2.5)


def rules_of(site: qrecipe.Site, members: Sequence[Any]) -> QConfigMapping:
    """Plain torch's mapping for one site alone."""
    int8 = qconfig(RECIPE.qconfigs["int8"], "ptq")
    mapping = QConfigMapping().set_global(None)
    first = members[0]
    if first.module is not None:
        return mapping.set_module_name(first.module, int8)
    number = int(site.name.partition("#")[2] or 0)
    for target in _TARGETS[first.op]:
        mapping.set_module_name_object_type_order(first.scopes[0], target, number, int8)
    if len(members) > 1:  # torch asks for the rule of the last member, counted after fusion
        mapping.set_module_name_object_type_order(first.scopes[0], nn.ReLU, 0, int8)
    return mapping


def loop(net: Net, rules: dict[str, QConfigMapping]) -> dict[str, float]:
    """The SQNR of the output with each site alone quantized, as the tutorial computes it."""
    found = {}
    with torch.no_grad():
        references = [net.model(batch) for batch in net.batches]
        for name, mapping in rules.items():
            prepared = prepare_fx(copy.deepcopy(net.model), mapping, (net.batches[0],))
            for batch in net.batches:
                prepared(batch)
            converted = convert_fx(prepared)
            totals = Totals()
            for batch, reference in zip(net.batches, references, strict=True):
                totals.add(reference, converted(batch))
            found[name] = sqnr_db(totals)
    return found


def sqnr_db(totals: Totals) -> float:
    fidelity = totals.fidelity()
    assert fidelity is not None
    return fidelity.sqnr_db


def rules_of_all(net: Net) -> dict[str, QConfigMapping]:
    inventory = inventory_of(net.model, RECIPE, Inputs.from_batch(net.batches[0]))
    plan = make_plan(inventory, RECIPE)
    skipped = unranked(inventory, plan)
    return {
        site.name: rules_of(site, inventory.matches[site.name].operation.members)
        for site in plan.sites
        if site.name not in skipped
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def exact(net: Net) -> dict[str, float]:
    return _by_name(sensitivity(net.model, RECIPE, net.batches, progress=False))


def estimate(net: Net, seed: int) -> dict[str, float]:
    ranking = sensitivity(
        net.model, RECIPE, net.batches, method="estimate", seed=seed, progress=False
    )
    return _by_name(ranking)


def _by_name(ranking: qrecipe.Ranking) -> dict[str, float]:
    return {site.name: site.sqnr_db for site in ranking.sites if site.sqnr_db is not None}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def swapped(expected: dict[str, float], found: dict[str, float]) -> int:
    """Pairs in another order although they differ by more than 1e-3 dB."""
    return sum(
        (expected[a] - expected[b]) * (found[a] - found[b]) < 0
        and abs(expected[a] - expected[b]) > SWAPPED_DB
        for a, b in itertools.combinations(expected, 2)
    )


def report(net: Net) -> bool:
    rules = rules_of_all(net)
    exact(net)  # imports and compilation don't count
    exact_runs = [timed(lambda: exact(net)) for _ in range(ROUNDS - 1)]
    loop_seconds, expected = timed(lambda: loop(net, rules))
    exact_runs.append(timed(lambda: exact(net)))
    estimate_runs = [timed(lambda s=s: estimate(net, s)) for s in range(ESTIMATE_SEEDS)]  # type: ignore[misc]
    found = exact_runs[0][1]
    names = list(expected)
    difference = max(abs(expected[name] - found[name]) for name in names)
    seconds = statistics.median(run[0] for run in exact_runs)
    estimate_seconds = statistics.median(run[0] for run in estimate_runs)
    order = [expected[name] for name in names]
    correlation = statistics.median(
        spearman(order, [run[1][name] for name in names]) for run in estimate_runs
    )
    pairs = swapped(expected, found)
    print(
        f"{net.name}: {len(names)} sites, {min(order):.1f} to {max(order):.1f} dB\n"
        f"  loop      {loop_seconds:7.2f} s\n"
        f"  exact     {seconds:7.2f} s  {loop_seconds / seconds:5.2f} times as fast "
        f"(aim {net.aim}), at most {difference:.1e} dB off, {pairs} pairs swapped\n"
        f"  estimate  {estimate_seconds:7.2f} s  {loop_seconds / estimate_seconds:5.2f} times "
        f"as fast (aim 8), Spearman {correlation:.3f}"
    )
    return (
        loop_seconds / seconds >= net.aim
        and loop_seconds / estimate_seconds >= 8
        and difference <= EXACT_DB
        and not pairs
        and correlation >= 0.95
    )


def cost_by_layers(path: str) -> None:
    from matplotlib.figure import Figure

    rows = []
    for layers in LAYERS:
        net = Net(
            f"{layers} layers",
            warmed(Chain(layers), 16, 3, 32, 32),
            [torch.randn(16, 3, 32, 32) for _ in range(4)],
            1.0,
        )
        rules = rules_of_all(net)
        exact(net)
        forward, _ = timed(lambda n=net: [n.model(batch) for batch in n.batches])  # type: ignore[misc]
        seconds, _ = timed(lambda n=net: exact(n))  # type: ignore[misc]
        estimated, _ = timed(lambda n=net: estimate(n, 0))  # type: ignore[misc]
        looped, _ = timed(lambda n=net, r=rules: loop(n, r))  # type: ignore[misc]
        rows.append((layers, looped, seconds, estimated, forward * layers / 2))
        print(
            f"{layers:3} layers: loop {looped:6.2f} s, exact {seconds:6.2f} s "
            f"({looped / seconds:.1f}), estimate {estimated:5.2f} s ({looped / estimated:.1f}), "
            f"L/2 forwards {forward * layers / 2:6.2f} s"
        )
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    labels = ("tutorial loop", "exact", "estimate", "L/2 forwards: all suffixes")
    for column, label in enumerate(labels, start=1):
        style = "k:" if column == len(labels) else "o-"
        axes.loglog(LAYERS, [row[column] for row in rows], style, label=label)
    axes.set_xticks(LAYERS, [str(layers) for layers in LAYERS])
    axes.minorticks_off()
    axes.set_xlabel("layers")
    axes.set_ylabel("CPU seconds, 4 batches of 16")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def other_rankings(net: Net) -> None:
    """How other figures rank the sites, against the exact effect on the output."""
    effects = exact(net)
    converted = qrecipe.quantize(net.model, RECIPE, net.batches, progress=False)
    compared = {
        site.name: site
        for site in qrecipe.compare(net.model, converted, net.batches, progress=False).sites
    }
    local = local_sqnr(net)
    weighted = [name for name in effects if compared[name].weight is not None]
    candidates: dict[str, dict[str, float]] = {
        "SQNR of the weights": {name: _db(compared[name].weight) for name in weighted},
        "SQNR of the site's own output, float inputs": local,
        "SQNR of the activation in the quantized model": {
            name: _db(compared[name].activation) for name in effects
        },
    }
    print(net.name)
    for label, values in candidates.items():
        correlation = spearman([effects[name] for name in values], list(values.values()))
        print(f"  {label:48} Spearman {correlation:+.2f} over {len(values)} sites")
    gaps = shared_prepare_gaps(net, effects)
    print(
        f"  one shared prepare, then None for all others: up to {max(gaps):.1f} dB off, "
        f"median {statistics.median(gaps):.2f}, over {len(gaps)} module sites"
    )


def _db(fidelity: Any) -> float:
    return float(fidelity.sqnr_db)


def local_sqnr(net: Net) -> dict[str, float]:
    """What each site loses by itself: its int8 output for float inputs against its float output."""
    inputs = Inputs.from_batch(net.batches[0])
    inventory = inventory_of(net.model, RECIPE, inputs)
    plan = make_plan(inventory, RECIPE)
    skipped = unranked(inventory, plan)
    sites = [site for site in plan.sites if site.name not in skipped]
    task = Task(net.model, RECIPE, inventory, plan, inputs, ())
    calibrate = partial(qrecipe.calibrate, batches=net.batches, progress=False)
    isolated = executor_of(plan.executor).isolated(task, sites, calibrate)
    totals = {site.name: Totals() for site in sites}
    handles = []
    for lone in isolated.sites:

        def note(module: nn.Module, args: Any, output: Any, name: str = lone.site.name) -> None:
            totals[name].add(output, isolated.kernels[name](*args))

        handles.append(lone.original.register_forward_hook(note))
    with torch.no_grad(), engine(plan.backend):
        for batch in net.batches:
            isolated.float_model(batch)
    return {name: sqnr_db(total) for name, total in totals.items()}


def shared_prepare_gaps(net: Net, effects: dict[str, float]) -> list[float]:
    """The error of preparing once for all sites and converting with None for all but one."""
    int8 = qconfig(RECIPE.qconfigs["int8"], "ptq")
    modules = dict(net.model.named_modules())
    names = [name for name in effects if name in modules]
    everything = QConfigMapping().set_global(None)
    for name in names:
        everything.set_module_name(name, int8)
    prepared = prepare_fx(copy.deepcopy(net.model), everything, (net.batches[0],))
    with torch.no_grad():
        references = [net.model(batch) for batch in net.batches]
        for batch in net.batches:
            prepared(batch)
        gaps = []
        for name in names:
            one = QConfigMapping().set_global(None)
            for other in names:
                one.set_module_name(other, int8 if other == name else None)
            converted = convert_fx(copy.deepcopy(prepared), qconfig_mapping=one)
            totals = Totals()
            for batch, reference in zip(net.batches, references, strict=True):
                totals.add(reference, converted(batch))
            gaps.append(abs(sqnr_db(totals) - effects[name]))
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", metavar="IMAGE")
    parser.add_argument("--rankings", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.layers:
        with torch.no_grad():
            cost_by_layers(options.layers)
    elif options.rankings:
        for net in nets():
            other_rankings(net)
    else:
        reached = [report(net) for net in nets()]  # all of them, whatever the first returns
        if not all(reached):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
