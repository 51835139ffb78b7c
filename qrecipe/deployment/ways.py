"""The ways to run a model, each with how it is made: a runtime, in float or in int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.artifact.export.judged import Written
from qrecipe.artifact.export.targets import TARGETS, Calibrated
from qrecipe.artifact.export.targets import Name as Target
from qrecipe.artifact.saving import save_quantized
from qrecipe.deployment.job import Job, Planned
from qrecipe.deployment.sites import sites_alone
from qrecipe.deployment.verdict import SitesAlone
from qrecipe.measure.sizes import model_size
from qrecipe.model.call import Inputs
from qrecipe.planning.target_cpu import unjudged_sites
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.overlay import for_executorch
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Executor
from qrecipe.runtimes.executorch import lowered
from qrecipe.runtimes.session import Session, in_integers
from qrecipe.runtimes.table import RUNTIMES, Name

Precision = Literal["float", "int8"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The sites that are planned in integers, and those of them that the runtime has in float.

    ``operations`` counts what the runtime reports to run in integers, if it reports that. Where
    torch's compiler or ExecuTorch tells, only layers with weights are counted.
    """

    planned: int
    in_float: tuple[str, ...]
    operations: Mapping[str, int] = field(default_factory=lambda: FrozenMapping({}))


@dataclass(frozen=True, slots=True)
class Made:
    """A session, the bytes of its file, and what was planned; a float session has no plan.

    ``alone`` judges the sites one by one, where the runtime can be made to run them so.
    """

    session: Session
    nbytes: int | None
    planned: Planned | None = None
    kernels: Kernels | None = None
    alone: SitesAlone | None = None


Make = Callable[[Job, int], Made]
"""Makes a session that has so many threads."""


@dataclass(frozen=True, slots=True)
class Way:
    """``command`` writes the file, given a recipe, a model and data; float has none.

    ``executors`` are those that can make it, the first of which stands in for others; none of them
    is named where all can.
    """

    runtime: Name
    precision: Precision
    make: Make
    command: str | None = None
    executors: tuple[Executor, ...] = ()

    @property
    def title(self) -> str:
        return title_of(self.runtime, self.precision)


def title_of(runtime: Name, precision: Precision) -> str:
    """``OpenVINO int8``."""
    return f"{RUNTIMES[runtime].title} {precision}"


def _torch_float(job: Job, threads: int) -> Made:
    return Made(RUNTIMES["torch"].open(job.model, threads), model_size(job.model))


def _torch_int8(job: Job, threads: int) -> Made:
    is_program = job.recipe.executor == "pt2e"  # whose integers torch computes with in float
    planned = job.executed_by("fx") if is_program else job.planned(job.recipe)
    unjudged_sites(planned.compiled.plan, "this")
    converted = planned.compiled.convert(planned.prepared)
    file = job.folder / "model.safetensors"
    save_quantized(converted, file)
    session = RUNTIMES["torch"].open(converted, threads)
    return Made(session, file.stat().st_size, planned, Kernels(len(_in_integers(planned)), ()))


def _compiled_float(job: Job, threads: int) -> Made:
    return Made(RUNTIMES["inductor"].open(job.model, threads), None)


def _onnx_content(model: nn.Module, inputs: Inputs) -> bytes:
    """ONNX, as torch exports it."""
    given = inputs.cloned()
    with unheard(), held_back([("", Warning)]):
        program = torch.onnx.export(
            model, given.args, kwargs=dict(given.kwargs), dynamo=True, verbose=False
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _pte_content(model: nn.Module, inputs: Inputs) -> bytes:
    """ExecuTorch, with the float kernels of XNNPACK."""
    given = inputs.cloned()
    with unheard(), quiet(), held_back([("", Warning)]):
        exported = torch.export.export(model, given.args, dict(given.kwargs))
        return bytes(lowered(exported).to_executorch().buffer)


def _float_file(runtime: Name, name: str, content: Callable[[nn.Module, Inputs], bytes]) -> Make:
    """The float model as a file of this name, which is written once."""

    def make(job: Job, threads: int) -> Made:
        file = job.folder / name
        if not file.exists():
            file.write_bytes(content(job.model, job.timed))
        return Made(RUNTIMES[runtime].open(file, threads), file.stat().st_size)

    return make


def _lowered(runtime: Name, target: Target, planned_by: Callable[[Job], Planned]) -> Make:
    """What a compiler makes of a program, which it audits itself."""

    def make(job: Job, threads: int) -> Made:
        planned, file = planned_by(job), job.folder / f"int8.{target}.pt2"
        lowering = _written(target, planned, file).lowering
        assert lowering is not None
        left = lowering.without_kernel
        kernels = Kernels(lowering.layers + len(left), left)
        return Made(RUNTIMES[runtime].open(file, threads), file.stat().st_size, planned, kernels)

    return make


def _of_nodes(runtime: Name, target: Target, name: str) -> Make:
    """A file whose nodes are known to the runtime by their names."""

    def make(job: Job, threads: int) -> Made:
        planned, file = job.planned(job.recipe), job.folder / name
        _written(target, planned, file)
        session = RUNTIMES[runtime].open(file, threads)
        found, sites = session.kernels() or (), _in_integers(planned)
        made = in_integers(found, sites)
        count = Counter(kernel.operation for kernel in found if kernel.is_integer)
        kernels = Kernels(
            len(sites),
            tuple(site for site in sites if site not in made),
            FrozenMapping(dict(count.most_common())),
        )
        nbytes = sum(each.stat().st_size for each in TARGETS[target].files(file))
        return Made(session, nbytes, planned, kernels, partial(sites_alone, planned, runtime))

    return make


def _written(target: Target, planned: Planned, file: Path) -> Written:
    source = Calibrated(planned.compiled, planned.prepared)
    return TARGETS[target].write(source, file, "batch")


def _in_integers(planned: Planned) -> list[str]:
    """The sites that compute in integers; weights alone are dequantized."""
    plan = planned.compiled.plan
    computed = [site for site in plan.sites if site.verdict == "quantized"]
    return [site.name for site in computed if site.mode != "weight_only"]


def _exported(runtime: Name, target: Target, file: str, make: Make) -> Way:
    """The way of a file that ``qrecipe export`` writes."""
    executor = TARGETS[target].executor
    command = f"export {{}} --to {target} --out {file}"
    return Way(runtime, "int8", make, command, () if executor is None else (executor,))


_AOTI = _lowered("inductor", "aoti", lambda job: job.executed_by("pt2e"))
_PTE = _lowered("executorch", "pte", lambda job: job.planned(for_executorch(job.recipe)))
_ONNX = _of_nodes("onnxruntime", "onnx", "int8.onnx")
_OPENVINO = _of_nodes("openvino", "openvino", "int8.xml")

WAYS = (
    Way("torch", "float", _torch_float),
    Way("torch", "int8", _torch_int8, "quantize {} --out model.safetensors", ("fx", "eager")),
    Way("inductor", "float", _compiled_float),
    _exported("inductor", "aoti", "model.pt2", _AOTI),
    Way("executorch", "float", _float_file("executorch", "float.pte", _pte_content)),
    _exported("executorch", "pte", "model.pte", _PTE),
    Way("onnxruntime", "float", _float_file("onnxruntime", "float.onnx", _onnx_content)),
    _exported("onnxruntime", "onnx", "model.onnx", _ONNX),
    Way("openvino", "float", _float_file("openvino", "float.onnx", _onnx_content)),
    _exported("openvino", "openvino", "model.xml", _OPENVINO),
)


def commands(arguments: str, recipe: Recipe, *, is_for_vnni: bool) -> Mapping[str, str]:
    """The commands that write the files that were measured, by title.

    ``arguments`` are the recipe, the model and the data, as a shell takes them. None for a recipe
    that trains, since commands do not.
    """
    found = {}
    for way in WAYS if recipe.phase == "ptq" else ():
        if way.command is None:
            continue
        given = arguments
        if way.executors and recipe.executor not in (None, *way.executors):
            given += f" --executor {way.executors[0]}"
        if is_for_vnni and way.runtime != "torch":
            given += " --target-cpu vnni"
        found[way.title] = f"qrecipe {way.command.format(given)}"
    return FrozenMapping(found)
