"""One model quantized once, and what a plan and a converted model have to agree in.

Each check takes a `Run` and gives what is wrong, by the site's name, without using the audit.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import random
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from runs import exactly, silent, tensors_of
from torch import fx, nn
from torch.ao.quantization import qconfig_equals
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.quantize_fx import convert_to_reference_fx
from training import train

import qrecipe
from qrecipe.execution.engine import engine
from qrecipe.execution.fx.convert import as_torch_prepared
from qrecipe.execution.fx.emission import erase_marks
from qrecipe.model.addresses import site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.moving import PIECE
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.plan import Plan, Site


@dataclass(frozen=True)
class Run:
    """``codes`` are those of the warnings on the way."""

    model: nn.Module
    batches: list[Any]
    compiled: qrecipe.CompiledRecipe
    prepared: fx.GraphModule
    converted: fx.GraphModule
    codes: frozenset[str]

    @property
    def plan(self) -> Plan:
        return self.compiled.plan

    @property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.plan.sites}


def execute(model: nn.Module, batches: list[Any], recipe: qrecipe.Recipe) -> Run:
    """Compile, prepare, calibrate or train, and convert; raises what they raise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = qrecipe.compile(model, recipe, batches[0], target_cpu="vnni")
        prepared = compiled.prepare()
        if recipe.phase == "qat":
            train(prepared, batches, rate=1e-6)
        else:
            qrecipe.calibrate(prepared, batches, progress=silent)
        converted = compiled.convert(prepared)
    ours = [w.message for w in caught if issubclass(w.category, qrecipe.QRecipeWarning)]
    codes = frozenset(str(message).split()[0] for message in ours)
    return Run(model, batches, compiled, prepared, converted, codes)


def forget_models() -> None:
    """Free large models of earlier runs: torch keeps what it converts, and graphs are cycles."""
    assert_and_get_unique_device.cache_clear()
    gc.collect()


def half_float(names: Collection[str], base: str, seed: int, own: str = "") -> qrecipe.Recipe:
    """``base`` with a random half of the named sites left float, each by its exact name.

    ``own`` is what the recipe sets besides.
    """
    head = f'format = 1\nextends = "{base}"\n{own}'
    chosen = random.Random(seed).sample(list(names), len(names) // 2)
    rules = "".join(f'"{exactly(name)}" = "float"\n' for name in chosen)
    return qrecipe.parse_recipe(f"{head}[rules.module_name]\n{rules}")


# --- assigned


def wrongly_assigned(run: Run) -> dict[str, str]:
    """Nodes to which FX gave another qconfig than the plan says, or gave one unasked."""
    assigned = run.prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    sites, wrong, seen = run.sites, {}, set()
    for node in run.prepared.graph.nodes:
        if node.name not in assigned:
            continue
        name = node.meta.get("site")
        spec = sites[name].qconfig if name is not None else None
        expected = None if spec is None else qconfig(spec, run.plan.phase)
        if not qconfig_equals(assigned[node.name], expected):
            wrong[name or node.name] = f"{assigned[node.name]} instead of {expected}"
        seen.add(name)
    wrong.update(dict.fromkeys(sites.keys() - seen, "given nothing"))
    return wrong


# --- converted


def wrong_classes(run: Run) -> dict[str, str]:
    """Weighted sites whose class in the converted model is not the one of their verdict."""
    sites, wrong = run.sites, {}
    for node in run.converted.graph.nodes:
        name = site_of(node)
        if node.op != "call_module" or name is None:
            continue
        module = run.converted.get_submodule(node.target)
        spec = sites[name].qconfig
        wants = spec is not None and spec.weight is not None
        is_quantized = ".quantized." in type(module).__module__
        is_leftover = ".reference." in type(module).__module__
        if is_leftover or (wants and not is_quantized):
            wrong[name] = f"{type(module).__module__} and not {spec}"
        elif is_quantized and sites[name].verdict == "float":
            wrong[name] = f"{type(module).__module__} and not float"
    return wrong


# --- computed


@dataclass(frozen=True)
class Judged:
    """A kernel against its float operation, on the very same input.

    ``steps`` is how far it is, in steps of its own output, from the float result on its own grid;
    ``loss`` how much farther from the float result than the reference is, in steps of the coarser
    of the two: a kernel whose output keeps a range that does not fit loses there.
    """

    steps: float
    loss: float
    same_range: bool


def judged_kernels(run: Run, batch: Any) -> dict[str, Judged]:
    """Each site's kernel against what `convert_to_reference_fx` makes of the prepared model.

    They read what this CPU can compute exactly.
    """
    inputs = Inputs.from_batch(batch)
    reference = _reference(run)
    with torch.no_grad(), engine(run.plan.backend):
        kernels = _Kernels(run.converted)
        kernels.run(*bind(run.converted, run.converted, inputs))
        judge = _Judge(reference, kernels)
        judge.run(*bind(reference, reference, inputs))
    return judge.judged


def wrong_kernels(run: Run, batch: Any) -> dict[str, str]:
    """Sites whose kernel does not give what its float operation gives, rounded.

    One step apart is right, where a tie or a sum in another order goes the other way.
    """
    judged, sites = judged_kernels(run, batch), run.sites
    wrong = {
        name: str(found)
        for name, found in judged.items()
        # what is not quantized itself keeps the range of its input, whatever its observer has seen
        if found.steps > 1
        or found.loss > 1
        or (sites[name].verdict == "quantized" and not found.same_range)
    }
    unjudged = {
        name: "not judged"
        for name, site in sites.items()
        if site.mode == "static" and name not in judged
    }
    return wrong | unjudged


def _reference(run: Run) -> fx.GraphModule:
    prepared = as_torch_prepared(copy.deepcopy(run.prepared))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = convert_to_reference_fx(prepared, backend_config=run.compiled.backend_config)
    erase_marks(reference)
    return reference


class _Kernels(fx.Interpreter):
    """Keeps what each site gives, and what becomes of float values on entering int8."""

    def __init__(self, converted: fx.GraphModule) -> None:
        super().__init__(converted)
        self.results: dict[tuple[str | None, Any], torch.Tensor] = {}
        self.entered: dict[tuple[Any, str, float, int], torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if not isinstance(result, torch.Tensor) or not result.is_quantized:
            return result
        kept = result.clone()  # an operation in place may follow
        if n.target is torch.quantize_per_tensor:
            self.entered[_entry(n.args[0], result)] = kept
        elif site_of(n) is not None:
            self.results[site_of(n), n.meta.get(PIECE)] = kept
        return _exact_here(result)


class _Judge(fx.Interpreter):
    """Goes on from what the converted model had, so that each kernel is judged alone."""

    def __init__(self, reference: fx.GraphModule, kernels: _Kernels) -> None:
        super().__init__(reference)
        self.kernels = kernels
        self.judged: dict[str, Judged] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not torch.quantize_per_tensor:
            return result
        name = site_of(n.args[0])
        kernel = self.kernels.results.get((name, n.args[0].meta.get(PIECE)))
        if kernel is None:
            # a float value that falls on the other side of a tie would be another input
            return _exact_here(self.kernels.entered.get(_entry(n.args[0], result), result))
        judged = _judged(self.env[n.args[0]], result, kernel)
        self.judged[name] = max(judged, self.judged.get(name, judged), key=lambda of: of.steps)
        return _exact_here(kernel)


def _exact_here(x: torch.Tensor) -> torch.Tensor:
    """What kernels can read on this CPU without saturating: 7 bits where it has no VNNI."""
    is_exact = has_vnni() or torch.backends.quantized.engine == "qnnpack"
    if is_exact or x.dtype != torch.quint8 or x.qscheme() != torch.per_tensor_affine:
        return x
    codes, zero_point = x.int_repr().clamp(max=127), min(x.q_zero_point(), 127)
    return torch._make_per_tensor_quantized_tensor(codes, x.q_scale(), zero_point)


def _entry(source: fx.Node, quantized: torch.Tensor) -> tuple[Any, str, float, int]:
    name = site_of(source) or source.name
    return source.meta.get(PIECE), name, quantized.q_scale(), quantized.q_zero_point()


def _judged(exact: torch.Tensor, reference: torch.Tensor, kernel: torch.Tensor) -> Judged:
    scale, zero_point = kernel.q_scale(), kernel.q_zero_point()
    on_grid = torch.quantize_per_tensor(exact, scale, zero_point, kernel.dtype)
    steps = (on_grid.int_repr().int() - kernel.int_repr().int()).abs().max().item()
    farther = (kernel.dequantize() - exact).abs() - (reference.dequantize() - exact).abs()
    return Judged(
        steps,
        farther.max().item() / max(scale, reference.q_scale()),
        (reference.q_scale(), reference.q_zero_point()) == (scale, zero_point),
    )


def outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    """The floating tensors that a model gives for a batch."""
    with torch.no_grad():
        found = tensors_of(Inputs.from_batch(batch).call(model))
    return [tensor for tensor in found if tensor.is_floating_point()]


# --- the caller's model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a caller could see of a model, with identities where they must not change."""
    found: dict[str, Any] = {
        key: (id(tensor), tensor.dtype, tensor.requires_grad, _digest(tensor))
        for key, tensor in _tensors(model)
    }
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = [len(h) for name, h in vars(module).items() if name.endswith("_hooks")]
        found[f"module {path}"] = (type(module), module.training, sorted(vars(module)), hooks)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _digest(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy(), digest_size=16).digest()
