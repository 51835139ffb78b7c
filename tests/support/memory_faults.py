"""Too little memory, at any call of torch and in the process."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from faults import FEW_BATCHES, STATIC, Tally, in_child
from nets import NETS
from torch import nn

import qrecipe

_Result = TypeVar("_Result")

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


def out_of_memory(net: str, times: int, random: Random, tally: Tally) -> None:
    """Let torch fail to allocate at any of its calls inside `quantize`."""
    what = f"out of memory at a call, quantize of {net}"
    model, batches = NETS[net].model(), NETS[net].batches(2)

    def quantized() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qrecipe.QRecipeWarning)
            return qrecipe.quantize(model, FEW_BATCHES, batches, progress=False)

    expected = _digest_of_outputs(quantized(), batches[0])
    with _failing_at(None, MemoryError) as calls:
        quantized()
    before = _state(model)
    for _ in range(times):
        number = random.randrange(calls.made)
        error = random.choice([MemoryError, lambda: RuntimeError(ALLOCATOR)])
        problems = []
        with _failing_at(number, error) as struck:
            made = _end_of(quantized)
        end = made if isinstance(made, str) else _digest_of_outputs(made, batches[0])
        if end not in ("QR407", expected):
            problems.append(f"call {number} ({struck.name}): {end}")
        if _state(model) != before:
            problems.append(f"call {number} ({struck.name}): the caller's state has changed")
        tally.note(what, "quantized" if end == expected else end, *problems)
    if _digest_of_outputs(quantized(), batches[0]) != expected:
        tally.failures.append(f"{what}: afterwards quantize gives another model")


def _end_of(action: Callable[[], _Result]) -> _Result | str:
    """What it returns, or the code of its error, or an error that is not ours."""
    try:
        return action()
    except qrecipe.QRecipeError as error:
        return error.findings[0].code
    except BaseException:
        return f"leaked\n{traceback.format_exc(limit=-4)}"


@dataclass
class Calls:
    """The calls of torch's own functions, and the one that failed."""

    made: int = 0
    failed: bool = False
    name: str = ""


@contextmanager
def _failing_at(number: int | None, error: Callable[[], BaseException]) -> Iterator[Calls]:
    """Let the so many-th call of a function of torch raise."""
    calls = Calls()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event != "c_call" or not _allocates(argument):
            return
        if calls.made == number:
            calls.failed, calls.name = True, f"{argument.__name__} in {frame.f_code.co_name}"
            calls.made += 1
            raise error()
        calls.made += 1

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)


_ALLOCATING = frozenset(
    {
        *("clone", "empty", "empty_like", "zeros", "ones", "zeros_like", "ones_like", "tensor"),
        *("add", "mul", "sub", "div", "conv2d", "linear", "relu", "cat", "max_pool2d", "matmul"),
        *("contiguous", "to", "float", "dequantize", "quantize_per_tensor", "flatten", "square"),
        *("quantize_per_channel", "min", "max", "aminmax", "sum", "mean", "abs", "isfinite"),
        *("conv2d_prepack", "linear_prepack", "adaptive_avg_pool2d", "batch_norm", "histc"),
        *("item", "copy_", "numpy", "detach", "where", "equal", "rsqrt", "sqrt", "_make_subclass"),
    }
)


def _allocates(function: Any) -> bool:
    owner = type(getattr(function, "__self__", None)).__module__ or ""
    module = getattr(function, "__module__", None) or ""
    return (owner.startswith("torch") or module.startswith("torch")) and (
        function.__name__ in _ALLOCATING
    )


def _digest_of_outputs(model: nn.Module, batch: Any) -> str:
    with torch.no_grad():
        return hashlib.sha256(model(batch).numpy().tobytes()).hexdigest()


def _state(model: nn.Module) -> tuple[Any, ...]:
    """The caller's model, and what of the process torch and qrecipe change for a moment."""
    tensors = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        tensors.update(name.encode() + tensor.numpy().tobytes())
    modules = [
        (name, module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    return (
        tensors.hexdigest(),
        str(modules),
        [parameter.requires_grad for parameter in model.parameters()],
        torch.get_rng_state().numpy().tobytes(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_deterministic_debug_mode(),
        torch.backends.quantized.engine,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        list(warnings.filters),
        bool(torch.fx._symbolic_trace._is_fx_tracing_flag),
        nn.Module.__call__,
        nn.Module.__getattr__,
    )


def small_memory(times: int, random: Random, tally: Tally) -> None:
    """Quantize where little memory is left: a model, or an error that says so, and no crash."""
    what = "little memory, quantize of 8 MB"
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).eval()
    batches = [torch.randn(64, 512) for _ in range(2)]
    before = _state(model)

    def quantized() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qrecipe.QRecipeWarning)
            qrecipe.quantize(model, STATIC, batches, progress=False)
        return "quantized"

    def attempt(spare: int, said: Path) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (used + spare, hard))
        end = _end_of(quantized)
        problems = [] if end in ("QR407", "quantized") else [f"{spare:,} bytes: {end}"]
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, hard))
        if _state(model) != before:
            problems.append(f"{spare:,} bytes: the caller's state has changed")
        said.write_text(json.dumps([end, *problems]))

    with tempfile.TemporaryDirectory() as name:
        said = Path(name) / "said.json"
        for _ in range(times):
            spare = int(random.uniform(0, 48) * 2**20)
            code = in_child(lambda spare=spare: attempt(spare, said))
            if code == -signal.SIGSEGV:  # FBGEMM packs weights without a look at what it got
                tally.note(what, "torch crashed")
                continue
            end, *problems = json.loads(said.read_text()) if said.exists() else ["none"]
            if code:
                problems.append(f"{spare:,} bytes: ended with {code}")
            tally.note(what, end, *problems)
            said.unlink(missing_ok=True)
