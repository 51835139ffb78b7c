"""Interrupts and faults on purpose: kills, full disks, too little memory, long runs.

`tests/pipeline/test_faults.py` tries a few of each, `tools/faults.py` as many as it is told.
"""

from __future__ import annotations

import gc
import hashlib
import json
import linecache
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from nets import NETS
from runs import silent
from torch import nn
from tuning import alike, base, cancelling, closeness, full_loss

import qrecipe
from qrecipe.authoring.lock.file import write_lock
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.errors.findings import CODES
from qrecipe.measure.pages.page import save_page
from qrecipe.measure.pages.reports import comparison_page

_Result = TypeVar("_Result")

STATIC = "builtin:x86-static"
FEW_BATCHES = qrecipe.parse_recipe(
    f'format = 1\nextends = "{STATIC}"\n[lint]\nignore = ["QR201"]\n'
)
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


@dataclass
class Tally:
    """How often each fault was tried, what it came to, and where it did harm."""

    tried: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def note(self, what: str, end: str, *problems: str) -> None:
        self.tried[what] += 1
        self.ends[f"{what}: {end}"] += 1
        self.failures += [f"{what}: {problem}" for problem in problems]


PATIENCE = 60
"""Seconds of CPU time that a child may take."""


# what is written


Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """A kind of file: two writers of two contents, and the file's name."""

    name: str
    file: str
    writers: tuple[Writer, Writer]


@cache
def kinds() -> list[Kind]:
    """All kinds of files that are written as a whole."""
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    minmax = "builtin:x86-static-minmax"
    recipes = [qrecipe.load_recipe(name) for name in (STATIC, minmax)]
    plans = [qrecipe.plan(model, recipe, batches[0]) for recipe in recipes]
    made = [qrecipe.quantize(model, recipe, batches, progress=False) for recipe in recipes]
    ranking = qrecipe.sensitivity(model, STATIC, batches, progress=False)
    report = qrecipe.compare(model, made[0], batches, progress=False)
    pages = [
        comparison_page(report, why, qrecipe.provenance(made[0]), {}) for why in ("no", "none")
    ]

    def two(write: Callable[[Any, Path], object], values: Any) -> tuple[Writer, Writer]:
        first, second = values
        return lambda path: write(first, path), lambda path: write(second, path)

    return [
        Kind("lock files", "net.lock.toml", two(write_lock, plans)),
        Kind("overlays", "overlay.toml", two(lambda n, p: ranking.save_overlay(p, n), (1, 2))),
        Kind("recipes", "saved.toml", two(lambda recipe, p: recipe.save(p), recipes)),
        Kind("HTML pages", "page.html", two(save_page, pages)),
        Kind("stored models", "net.safetensors", two(qrecipe.save_quantized, made)),
        Kind("plots", "plot.svg", two(lambda r, p: r.plot(p), (ranking, report))),
    ]


# kill -9


STAGES = {"before": "tempfile.mkstemp", "written": "os.chmod", "replacing": "os.rename"}
"""Where a process kills itself: at an audit event of Python's."""


def _in_child(action: Callable[[], object]) -> int:
    """Run it in a fork that writes no core; the status of the child."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
            action()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(event: str, number: int) -> None:
    """Kill this process with SIGKILL at the so many-th audit event of that name."""
    left = number

    def hook(name: str, arguments: object) -> None:
        nonlocal left
        if name == event:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _kill_at_size(size: int) -> None:
    """Let the kernel kill this process when it writes beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


KILLED = (-signal.SIGKILL, -signal.SIGXFSZ, -signal.SIGALRM)


def _kill_in(seconds: float) -> None:
    """Let the kernel kill this process after a time."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def kills(kind: Kind, times: int, random: Random, tally: Tally) -> None:
    """Kill processes that replace a file: it has the former content or the new one."""
    what = f"kill -9, {kind.name}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / kind.file
        contents = []
        for write in kind.writers:
            write(path)
            contents.append(path.read_bytes())
        while tally.tried[what] < times:
            stage = random.choice([*STAGES, "half", "any time"])
            write = kind.writers[contents[0] == path.read_bytes()]

            def killed(stage: str = stage, write: Writer = write) -> None:
                if stage == "half":
                    _kill_at_size(random.randrange(min(map(len, contents))))
                elif stage == "any time":
                    _kill_in(random.uniform(1e-4, 5e-3))
                else:
                    _kill_at(STAGES[stage], 1)
                while True:
                    write(path)

            code = _in_child(killed)
            random.random()  # the child has drawn from its own copy
            left = [each for each in path.parent.iterdir() if each != path]
            problems = []
            if code not in KILLED:
                problems.append(f"at {stage}: ended with {code} instead of being killed")
            if path.read_bytes() not in contents and not _is_plot(path):
                problems.append(f"at {stage}: the file is neither the former nor the new one")
            tally.note(what, "in the midst of writing" if left else "before or after", *problems)
            for each in left:
                each.unlink()


def _is_plot(path: Path) -> bool:
    """Whether it is a whole plot; no two are equal."""
    return path.suffix == ".svg" and path.read_bytes().endswith(b"</svg>\n")


def killed_searches(times: int, random: Random, tally: Tally) -> None:
    """Kill searches while they write their log: each is resumed to the same result."""
    what = "kill -9, tune logs"
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    options = {"max_drop": full_loss(model, batches, evaluate) / 2}

    def search(log: Path) -> qrecipe.TuningResult:
        with patch.object(ModelBench, "_priced", alike):  # a killed search may not have its times
            return qrecipe.tune(
                model, base(), batches, evaluate, resume=log, progress=silent, **options
            )

    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.json"
        whole = search(log)
        size, every = log.stat().st_size, _trials(log)
        while tally.tried[what] < times:
            log.unlink()
            stage = random.choice([*STAGES, "half"])
            number = random.randint(1, len(every) + 1)

            def killed(stage: str = stage, number: int = number) -> None:
                if stage == "half":
                    _kill_at_size(size * number // (len(every) + 2))
                else:
                    _kill_at(STAGES[stage], number)
                search(log)

            code = _in_child(killed)
            problems = (
                [] if code < 0 else [f"at {stage} {number}: not killed, but ended with {code}"]
            )
            logged = _trials(log)
            if logged != every[: len(logged)]:
                problems.append(f"at {stage} {number}: the log is not a part of the whole search")
            result = search(log)
            if result.recipe.fingerprint != whole.recipe.fingerprint or _trials(log) != every:
                problems.append(f"at {stage} {number}: the resumed search found something else")
            for each in log.parent.iterdir():
                if each != log:
                    each.unlink()
            tally.note(
                what, "resumed with trials" if logged else "resumed from the start", *problems
            )


def _trials(log: Path) -> list[tuple[Any, ...]]:
    """What a log says of each trial, apart from how long it took."""
    if not log.exists():
        return []
    entries = json.loads(log.read_text())["trials"]
    times = ("seconds", "latency", "is_slower")
    return [tuple((k, str(v)) for k, v in sorted(e.items()) if k not in times) for e in entries]


# disk full


def full_disks(kind: Kind, times: int, random: Random, tally: Tally) -> None:
    """Let the disk be full at any size: an error of ours, the former file, and nothing else."""
    what = f"disk full, {kind.name}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / kind.file
        first, second = kind.writers
        first(path)
        before = path.read_bytes()
        for attempt in range(times):
            size = random.randrange(len(before) // 2) if attempt else 0
            end, problems = "an error", []
            try:
                with _limited(resource.RLIMIT_FSIZE, size):
                    second(path)
                end = "written"
                problems.append(f"{size} bytes: there was no error")
            except qrecipe.QRecipeError as error:
                end = ", ".join(finding.code for finding in error.findings)
                if not all(finding.code in CODES for finding in error.findings):
                    problems.append(f"{size} bytes: {error}")
            except Exception as error:
                problems.append(f"{size} bytes: leaked {error!r}")
            if path.read_bytes() != before:
                problems.append(f"{size} bytes: the former file has changed")
            if len(list(path.parent.iterdir())) != 1:
                problems.append(f"{size} bytes: a temporary file is left")
            tally.note(what, end, *problems)


@contextmanager
def _limited(what: int, limit: int) -> Iterator[None]:
    former = resource.getrlimit(what)
    resource.setrlimit(what, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, former)


# out of memory


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
            code = _in_child(lambda spare=spare: attempt(spare, said))
            if code == -signal.SIGSEGV:  # FBGEMM packs weights without a look at what it got
                tally.note(what, "torch crashed")
                continue
            end, *problems = json.loads(said.read_text()) if said.exists() else ["none"]
            if code:
                problems.append(f"{spare:,} bytes: ended with {code}")
            tally.note(what, end, *problems)
            said.unlink(missing_ok=True)


# long runs


def resident() -> int:
    """The bytes of this process in memory, after collecting garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes in memory, objects, modules, and lines of source kept."""

    bytes: int
    objects: int
    modules: int
    sources: int

    @classmethod
    def now(cls) -> Held:
        size = resident()
        return cls(size, len(gc.get_objects()), len(sys.modules), len(linecache.cache))


def many_batches(times: int, tally: Tally) -> None:
    """Calibrate on many batches: none is kept, and memory is flat."""
    what = "calibration batches"
    text = f'format = 1\nextends = "{STATIC}"\n[calibration]\nmax_batches = {times}\n'
    model = NETS["residual"].model()
    compiled = qrecipe.compile(model, qrecipe.parse_recipe(text), NETS["residual"].batches(1)[0])
    prepared = compiled.prepare()
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: dict[int, int] = {}

    def batches() -> Iterator[torch.Tensor]:
        for number in range(times):
            if number in (times // 5, times - 1):
                sizes[number] = resident()
            batch = torch.randn(64, 3, 16, 16)
            alive.append(weakref.ref(batch))
            tally.tried[what] += 1
            yield batch

    qrecipe.calibrate(prepared, batches(), progress=False)
    first, last = sizes.values()
    kept = sum(reference() is not None for reference in alive)
    tally.ends[f"{what}: {kept} batches kept, {(last - first) / 2**20:+.1f} MiB"] += 1
    if kept > 3:
        tally.failures.append(f"{what}: {kept} batches are kept")
    if last - first > 8 * 2**20:
        tally.failures.append(f"{what}: the process grew by {(last - first) / 2**20:.1f} MiB")


def repeats(times: int, tally: Tally) -> None:
    """Plan, quantize, save and load again and again: what the process holds stays the same."""
    what = "repeats of plan, quantize, save and load"
    net = NETS["residual"]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.safetensors"

        def once() -> None:
            model = net.model()
            qrecipe.plan(model, STATIC, net.batches(1)[0])
            qrecipe.save_quantized(
                qrecipe.quantize(model, STATIC, net.batches(2), progress=False), path
            )
            qrecipe.load_quantized(path, model)(net.batches(1)[0])
            tally.tried[what] += 1

        for _ in range(max(3, times // 10)):
            once()
        before = Held.now()
        while tally.tried[what] < times:
            once()
        after = Held.now()
    grown = {key: getattr(after, key) - getattr(before, key) for key in vars(after)}
    tally.ends[f"{what}: {grown}"] += 1
    rounds = times - max(3, times // 10)
    if grown["bytes"] > 8 * 2**20:
        tally.failures.append(f"{what}: the process grew by {grown['bytes'] / 2**20:.1f} MiB")
    # what waits for the garbage collector is a part of a few rounds
    if grown["modules"] or grown["sources"] > 100 + rounds // 10:
        tally.failures.append(f"{what}: {grown}")
