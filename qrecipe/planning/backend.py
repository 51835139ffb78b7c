"""What a backend can honour: decisions -> outcomes, with a reason if a site stays float.

The dtypes come from torch's BackendConfig of that name; `kernels` adds what is known about single
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from qrecipe._torch_fx import (
    TWO_INPUT_FUSIONS,
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
    ObservationType,
    get_executorch_backend_config,
    get_native_backend_config,
    get_onednn_backend_config,
    get_qnnpack_backend_config,
    get_tensorrt_backend_config,
)
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.model.moving import averages, moved, moves
from qrecipe.observers.qconfig import per_tensor
from qrecipe.planning.asked import DEQUANTIZE, MODES, PACK
from qrecipe.planning.engines import Detour, adds_in_32_bits, detour
from qrecipe.planning.kernels import (
    better_float,
    refusal,
    takes_per_channel_weight,
    weight_refusal,
    why_apart,
)
from qrecipe.planning.large_layers import faster_linear, has_choice, reads_tokens
from qrecipe.planning.plan import EXPORTED, Engine, Verdict
from qrecipe.planning.programs import LOOKS_UP, SAVES_MEMORY, WEIGHT_ONLY, no_operator
from qrecipe.planning.saturation import (
    ADDS_IN_16_BITS,
    exceeds_seven_bits,
    readers_of_seven_bits,
    takes_weight,
)
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import Backend, Constructor, Executor, Phase, TensorSpec, quantized_range
from qrecipe.rules.resolution import Decision
from qrecipe.rules.structure import Kind, Mode, Operation


def _onednn_config() -> BackendConfig:
    """torch's without convolution + addition, which only runs on onednn; models change engines."""
    configs = [
        config
        for config in get_onednn_backend_config().configs
        if config.fused_module not in TWO_INPUT_FUSIONS and config.pattern not in TWO_INPUT_FUSIONS
    ]
    return BackendConfig("onednn").set_backend_pattern_configs(configs)


_BACKEND_CONFIGS: Mapping[Backend, Callable[[], BackendConfig]] = {
    # x86 and fbgemm have their own configs, which lack LayerNorm
    "x86": get_native_backend_config,
    "fbgemm": get_native_backend_config,
    "onednn": _onednn_config,
    "qnnpack": get_qnnpack_backend_config,
    "executorch": get_executorch_backend_config,
    "tensorrt": get_tensorrt_backend_config,
}

FOLLOWERS: frozenset[Kind] = frozenset({"passthrough", "fixed_qparams"})
"""Operations that are only quantized after a quantized producer, whatever their rule says."""


_DTYPES: Mapping[Any, str] = {
    torch.qint8: "int8",
    torch.quint8: "uint8",
    torch.quint4x2: "uint4",
    torch.qint32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float16: "float16",
}
"""torch's dtypes as recipes name them; a kernel wants nothing of a float32 tensor."""

_DEFAULT_EPS = float(torch.finfo(torch.float32).eps)


Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A setting of a tensor that no kernel supports: the tensor's role, the key and the problem."""

    role: Role
    key: str
    problem: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happens to an operation.

    ``qconfig`` is what is executed, after substitutions, None for float; ``reason`` says why it
    stays float or what was substituted; ``honoured`` is False if a rule asks for more than the
    backend supports, and ``fault`` is the setting to blame, if it is a single one. ``engine`` is
    set if the weights are packed for another engine than the backend's.
    """

    verdict: Verdict
    mode: Mode | None
    qconfig: QConfigSpec | None
    reason: str | None
    honoured: bool = True
    engine: Engine | None = None
    fault: Fault | None = None

    @property
    def rounded(self) -> TensorSpec | None:
        """The spec of the result if that is rounded to a static range."""
        if self.mode != "static" or self.qconfig is None or not self.qconfig.rounds_results:
            return None
        return self.qconfig.activation


def backend_config(name: Backend) -> BackendConfig:
    """The BackendConfig with which to plan, prepare and convert for a backend.

    BatchNorms are folded into transposed convolutions by us, and torch cannot train them as one.
    """
    made = _BACKEND_CONFIGS[name]()
    if name not in EXPORTED:
        made.set_backend_pattern_configs(_own_patterns(made))
    configs = [config for config in made.configs if not _folds_into_transposed(config)]
    return BackendConfig(made.name).set_backend_pattern_configs(configs)


def _folds_into_transposed(config: BackendPatternConfig) -> bool:
    first = config.pattern[0] if isinstance(config.pattern, tuple) else None
    return isinstance(first, type) and issubclass(first, nn.modules.conv._ConvTransposeNd)


def _own_patterns(made: BackendConfig) -> list[BackendPatternConfig]:
    """What torch's kernels can do besides, with the dtypes that it knows for flatten."""
    known = next(config for config in made.configs if config.pattern is torch.flatten)
    sharing = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    own = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    return [
        BackendPatternConfig(operation)
        .set_observation_type(sharing if operation is moved else own)
        .set_dtype_configs(known.dtype_configs)
        for operation in (moved, nn.SiLU, F.silu)
    ]


@cache
def own_backend_config(name: Backend) -> BackendConfig:
    """The `backend_config` that qrecipe reads; it is made once and never given to callers."""
    return backend_config(name)


def outcomes(
    inventory: Inventory,
    decisions: Mapping[str, Decision],
    backend: Backend,
    phase: Phase,
    executor: Executor,
) -> dict[str, Outcome]:
    """Each operation's outcome by name, in order of execution."""
    readers = readers_of_seven_bits(inventory, decisions, backend)
    tokens = reads_tokens(inventory.model)
    found: dict[str, Outcome] = {}
    for name, match in inventory.matches.items():
        reader = readers.get(name)
        judge = _Judge(match, backend, phase, executor, found, reader, tokens)
        found[name] = judge.outcome(decisions[name])
    return found


def input_specs(
    operation: Operation, own: QConfigSpec, outcome_of: Mapping[str, Outcome]
) -> Iterator[TensorSpec]:
    """The specs of a static site's inputs: its producers', and its own for float tensors."""
    found = [outcome_of[name].rounded for name in operation.producers if name in outcome_of]
    yield from filter(None, found)
    is_whole = len(found) == len(operation.producers) > 0 and None not in found
    reads_float = not is_whole or operation.model_inputs or operation.stored
    if reads_float and own.activation is not None:
        yield own.activation


def saturating(
    inventory: Inventory, outcome_of: Mapping[str, Outcome], backend: Backend
) -> tuple[str, ...]:
    """The sites whose kernels saturate without VNNI, because they read more than 7 bits."""
    return tuple(
        name
        for name, outcome in outcome_of.items()
        if outcome.mode == "static"
        and outcome.qconfig is not None
        and outcome.qconfig.weight is not None
        and (outcome.engine or backend) in ADDS_IN_16_BITS
        and takes_weight(match := inventory.matches[name])
        and not adds_in_32_bits(match, outcome.engine or backend)
        and any(map(exceeds_seven_bits, input_specs(match.operation, outcome.qconfig, outcome_of)))
    )


def can_honour(
    inventory: Inventory,
    names: Sequence[str],
    qconfig: QConfigSpec,
    backend: Backend,
    phase: Phase,
    executor: Executor,
) -> bool:
    """Whether a rule that does not name them could quantize any of the named operations."""
    matches = (inventory.matches[name] for name in names)
    return any(
        _Judge(match, backend, phase, executor, {}).quantized(qconfig).honoured
        for match in matches
        if match.operation.kind != "unmatched"
        and match.operation.kind not in FOLLOWERS
        and better_float(match) is None
    )


def _float(reason: str, *, honoured: bool = True) -> Outcome:
    return Outcome("float", None, None, reason, honoured)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges one operation; ``earlier`` has the outcomes of its producers.

    ``reader`` is a kernel that reads the result and is limited to 7 bits, if there is one;
    ``reads_tokens`` tells that later inputs may be far shorter than the example.
    """

    match: Match
    backend: Backend
    phase: Phase
    executor: Executor
    earlier: Mapping[str, Outcome]
    reader: str | None = None
    reads_tokens: bool = False

    def outcome(self, decision: Decision) -> Outcome:
        found = self._outcome(decision)
        apart = why_apart(self.match) if self.phase == "qat" else None
        if apart is None or decision.rule.qconfig is None:
            return found
        return replace(found, reason="; ".join(filter(None, (found.reason, apart))))

    def _outcome(self, decision: Decision) -> Outcome:
        kind = self.match.operation.kind
        if self.match.operation.is_inserted:
            return _float("divides channels by [transform.smooth], in float")
        if kind == "passthrough":
            return self._follow(decision)
        qconfig = decision.rule.qconfig
        if qconfig is None:
            return _float(decision.rule.reason or "a rule leaves it float")
        if kind == "unmatched":
            none = f"{self.backend} has no quantized kernel for {self.match.operation.op}"
            return _float(refusal(self.match, self.backend) or none, honoured=False)
        better = None if decision.names_operation else better_float(self.match)
        return _float(better, honoured=False) if better else self.quantized(qconfig)

    def quantized(self, qconfig: QConfigSpec) -> Outcome:
        """The outcome of an operation that the backend has a pattern for."""
        known = refusal(self.match, self.backend)
        if known is not None:
            return _float(known, honoured=False)
        if self.match.operation.kind == "fixed_qparams":
            return self._fix(qconfig)
        return self._quantize(qconfig)

    def _follow(self, decision: Decision) -> Outcome:
        asked = decision.rule.qconfig
        if decision.names_operation and asked is None:
            return _float(decision.rule.reason or "a rule leaves it float")
        if decision.names_operation and asked is not None and mode_of(asked) != "static":
            return _float(self._no_mode(mode_of(asked)), honoured=False)
        known = refusal(self.match, self.backend)
        if known is not None:
            return _float(known, honoured=False)
        leader = self._quantized_producers()
        if isinstance(leader, str):
            return _float(leader)
        qconfig = QConfigSpec(weight=None, activation=leader)
        does = "moves the integers of" if any(map(moves, self.match.nodes)) else "follows"
        runs_here = self.executor in PACK and self.backend not in EXPORTED
        slow = runs_here and any(map(averages, self.match.nodes))
        faster = "; computed in float, which is faster" if slow else ""
        reason = f"{does} {', '.join(self.match.operation.producers)}{faster}"
        return Outcome("passthrough", "static", qconfig, reason)

    def _fix(self, qconfig: QConfigSpec) -> Outcome:
        if mode_of(qconfig) != "static":
            return _float(self._no_mode(mode_of(qconfig)), honoured=False)
        leader = self._quantized_producers()
        if isinstance(leader, str):
            return _float(f"its range is fixed, and {leader}")
        if self.reader is not None:
            return _float(f"its range is fixed at 8 bits, and {self.reader} can only read 7")
        for kernel in self.match.kernels:
            output = kernel.output_dtype_with_constraints
            if _DTYPES.get(output.dtype) == leader.dtype and output.scale_exact_match is not None:
                qparams = {
                    "scale": output.scale_exact_match,
                    "zero_point": output.zero_point_exact_match,
                }
                observer = Constructor.model_validate({"name": "fixed_qparams", **qparams})
                fixed = TensorSpec(
                    observer=observer, dtype=leader.dtype, qscheme="per_tensor_affine"
                )
                spec = QConfigSpec(weight=None, activation=fixed)
                return Outcome("quantized", "static", spec, "the operation fixes its range")
        return _float(f"{self.backend} has no fixed range for {leader.dtype} here", honoured=False)

    def _quantized_producers(self) -> TensorSpec | str:
        """The activation spec of the producers, or why there is none."""
        operation = self.match.operation
        if operation.model_inputs or not operation.producers:
            inputs = ", ".join(operation.model_inputs) or "its input"
            return f"follows {inputs}, which is float"
        specs = set[TensorSpec]()
        for name in operation.producers:
            spec = self.earlier[name].rounded
            if spec is None:
                return f"follows {name}, which returns float"
            specs.add(spec)
        if len(specs) > 1:
            # torch would give all of them the first one's observer
            names = ", ".join(operation.producers)
            return f"its producers {names} have different activation specs"
        return specs.pop()

    def _quantize(self, qconfig: QConfigSpec) -> Outcome:
        mode = mode_of(qconfig)
        if mode not in MODES[self.executor]:
            text = f'executor = "{self.executor}" has no {_word(mode)} mode'
            return _float(text, honoured=False)
        dequantizes = self.executor in DEQUANTIZE
        leaves_float = dequantizes and self.phase != "qat" and self.backend not in EXPORTED
        if not qconfig.rounds_results and mode == "static" and not leaves_float:
            text = 'only executor = "pt2e" without training leaves results float (inputs_only)'
            return _float(text, honoured=False)
        missing = no_operator(self.match, qconfig, self.phase) if dequantizes else None
        if missing is not None:
            return _float(missing, honoured=False)
        besides = (WEIGHT_ONLY,) if dequantizes and takes_weight(self.match) else ()
        known = (*self.match.kernels, *besides)
        kernels = [kernel for kernel in known if _mode_of_kernel(kernel) == mode]
        if not kernels:
            return _float(self._no_mode(mode), honoured=False)
        faults: list[Fault] = []
        for kernel in kernels:
            spec, note = self._substitute(qconfig, kernel)
            fault = _mismatch(spec, kernel, self.backend)
            if fault is None:
                return self._on_a_right_kernel(mode, spec, note)
            faults.append(fault)
        return replace(_float(faults[0].problem, honoured=False), fault=faults[0])

    def _on_a_right_kernel(self, mode: Mode, spec: QConfigSpec, note: str | None) -> Outcome:
        known = weight_refusal(self.match, self.backend, self.phase, spec.weight)
        if known is not None:
            return _float(known, honoured=False)
        notes, engine = [note] if note else [], None
        if mode == "static" and not spec.rounds_results:
            notes.append("its result stays float")
        if mode == "weight_only" and self.executor in DEQUANTIZE:
            is_table = isinstance(self.match.module, nn.Embedding)
            notes.append(LOOKS_UP if is_table else SAVES_MEMORY)
        if self.executor in PACK:
            found = self._detour(mode, spec)
            if isinstance(found, str):
                return _float(found, honoured=False)
            if found is not None:
                notes += filter(None, [found.reason])
                engine = found.engine
        return Outcome("quantized", mode, spec, "; ".join(notes) or None, engine=engine)

    def _detour(self, mode: Mode, spec: QConfigSpec) -> Detour | str | None:
        """Another engine for the site, or the reason to stay float."""
        if mode != "weight_only" and not self.reads_tokens and has_choice(self.match):
            return faster_linear(self.match, self.backend, spec.weight)
        if mode == "static":
            return detour(self.match, self.backend, spec.weight, self._input_levels(spec))
        return None

    def _input_levels(self, own: QConfigSpec) -> int:
        """The most integers that the input may span."""
        specs = input_specs(self.match.operation, own, self.earlier)
        ranges = filter(None, map(quantized_range, specs))
        return max((high - low for low, high in ranges), default=0)

    def _substitute(
        self, qconfig: QConfigSpec, kernel: DTypeConfig
    ) -> tuple[QConfigSpec, str | None]:
        """The qconfig as the kernel takes it, and what had to change."""
        if kernel.weight_dtype not in _DTYPES:
            return replace(qconfig, weight=None), None
        weight = qconfig.weight
        if weight is None or weight.is_per_tensor or takes_per_channel_weight(self.match):
            return qconfig, None
        note = "per-tensor weight: no kernel supports per-channel weights here"
        return replace(qconfig, weight=per_tensor(weight)), note

    def _no_mode(self, mode: Mode) -> str:
        available = {_word(_mode_of_kernel(kernel)) for kernel in self.match.kernels}
        others = " or ".join(sorted(available))
        kernel = f"{self.backend} has no {_word(mode)} kernel for {self.match.operation.op}"
        if mode == "weight_only" and takes_weight(self.match):
            others = f'{others}, or {_word(mode)} with executor = "pt2e"'
        return f"{kernel}; it can be {others}" if others else kernel


def mode_of(qconfig: QConfigSpec) -> Mode:
    """The kind of quantization that a qconfig asks for."""
    if qconfig.activation is None or qconfig.activation.dtype == "float32":
        return "weight_only"
    return "dynamic" if qconfig.activation.is_dynamic else "static"


def _word(mode: Mode) -> str:
    return mode.replace("_", "-")


def _mode_of_kernel(kernel: DTypeConfig) -> Mode:
    if kernel.is_dynamic:
        return "dynamic"
    return "weight_only" if kernel.input_dtype == torch.float32 else "static"


def _mismatch(qconfig: QConfigSpec, kernel: DTypeConfig, backend: Backend) -> Fault | None:
    """Why a kernel cannot run ``qconfig``, or None where it can."""
    sides: tuple[tuple[Role, TensorSpec | None, DTypeWithConstraints], ...] = (
        ("activation", qconfig.activation, kernel.input_dtype_with_constraints),
        ("weight", qconfig.weight, kernel.weight_dtype_with_constraints),
    )
    for role, spec, wanted in sides:
        dtype = _DTYPES.get(wanted.dtype)
        if dtype is None:
            continue
        if spec is None:
            return Fault(role, "", f"{backend} needs a {dtype} {role} here, but there is none")
        found = _dtype_problem(role, spec, wanted)
        if found is not None:
            key, problem = found
            return Fault(role, key, f"{backend} {problem}")
    return None


def _dtype_problem(
    role: Role, spec: TensorSpec, wanted: DTypeWithConstraints
) -> tuple[str, str] | None:
    """The key at fault, and what is wrong with it."""
    dtype = _DTYPES[wanted.dtype]
    stored = {"int4": "int8"}.get(str(spec.dtype), spec.dtype)
    if stored != dtype:
        return "dtype", f"needs {dtype} {role}s here, not {spec.dtype}"
    low, high = quantized_range(spec) or (0, 0)
    least, most = wanted.quant_min_lower_bound, wanted.quant_max_upper_bound
    if least is not None and most is not None and not least <= low <= high <= most:
        needs = f"needs {role}s in {least}..{most} here, not {low}..{high}"
        return "quant_min" if low < least else "quant_max", f"{needs}: set quant_min and quant_max"
    eps = spec.eps if spec.eps is not None else _DEFAULT_EPS
    least_scale = wanted.scale_min_lower_bound
    if least_scale is not None and eps < least_scale:
        return "eps", f"needs eps >= {least_scale} for {role}s here: set eps"
    return None
