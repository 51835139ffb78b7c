"""The effect of each site on the output, estimated for all sites by a few backward passes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.audit.sqnr import energy_ratio_db, floating_tensors
from qrecipe.errors.findings import ExecutionError
from qrecipe.execution.isolated import Isolated, Kernel
from qrecipe.measure.sensitivity.exact import size_of, too_little_memory
from qrecipe.model.call import Inputs
from qrecipe.process.warnings import import_aside

_Place = tuple[str, Tensor, Tensor]
"""A site, a floating tensor that it gave, and the error of its kernel there."""


class Estimate:
    """Projects each site's error on random directions of the output.

    For the error e of a site and the Jacobian J of the output with respect to the site's output,
    the mean of (r^T J e)^2 over random r with unit covariance is |J e|^2: the energy of the output
    error, to first order. One backward pass gives r^T J for all sites. If samples are independent,
    each one is a projection of its own.

    Source: Hutchinson's estimator of a trace, here of J e e^T J^T.
    """

    def __init__(self, isolated: Isolated, probes: int, seed: int, memory_limit: int) -> None:
        import_aside("torch.fx.experimental.symbolic_shapes")  # or torch does, at a gradient
        self._model = isolated.float_model
        self._sites = isolated.sites
        self._probes = {
            lone.site.name: _Probe(lone.original, isolated.kernels[lone.site.name])
            for lone in self._sites
        }
        self._runs: deque[tuple[Any, list[_Place]]] = deque()
        self._count = probes
        self._limit = memory_limit
        self._generator = torch.Generator().manual_seed(seed)
        self._signal: list[float] = []
        self._noise: dict[str, list[float]] = {name: [] for name in self._probes}

    @contextmanager
    def probing(self) -> Iterator[nn.Module]:
        """The float model, to be called with a probe at each site inside a ``with``."""
        run = self._model.forward
        with ExitStack() as replaced:
            for lone in self._sites:
                replaced.enter_context(lone.replaced(self._probes[lone.site.name]))
            replaced.enter_context(running(self._model, partial(self._run, run)))
            yield self._model

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            output = forward(*args, **kwargs)
        places = [
            (name, given, error)
            for name, probe in self._probes.items()
            for given, error in probe.taken()
        ]
        self._runs.append((output, places))
        return output

    def add(self, inputs: Inputs) -> None:
        """Count the next call that ran."""
        output, places = self._runs.popleft()
        outputs = floating_tensors(output)
        self._check(outputs, places)
        for index, output in enumerate(outputs):
            _add(self._signal, index, output.detach().double().square().sum().item())
            for _ in range(self._count):
                self._project(index, output, places, inputs.batch_size)

    def sqnr_db(self) -> dict[str, float]:
        """The estimate for each site; of several output tensors the worst counts."""
        return {
            name: min(
                (
                    energy_ratio_db(signal, noise / self._count)
                    for signal, noise in zip(self._signal, energies, strict=True)
                ),
                default=math.nan,
            )
            for name, energies in self._noise.items()
        }

    def _check(self, outputs: Sequence[Tensor], places: Sequence[_Place]) -> None:
        if not any(output.requires_grad for output in outputs):
            raise ExecutionError.of(
                "QR422",
                "the model's output has no gradient to estimate effects from",
                hint='use method = "exact", with a metric if the output is not floating',
            )
        held = 2 * sum(size_of(given) for _, given, _ in places)
        if held > self._limit:
            raise too_little_memory("estimating all sites at once", held, self._limit)

    def _project(
        self, index: int, output: Tensor, places: Sequence[_Place], samples: int | None
    ) -> None:
        if not output.requires_grad:
            for energies in self._noise.values():
                _add(energies, index, 0.0)
            return
        direction = torch.randn(output.shape, generator=self._generator)
        gradients = torch.autograd.grad(
            output,
            [given for _, given, _ in places],
            direction,
            retain_graph=True,
            allow_unused=True,
        )
        by_sample = samples is not None and output.dim() > 0 and output.shape[0] == samples
        projections: dict[str, Tensor] = {}
        for (name, _, error), gradient in zip(places, gradients, strict=True):
            if gradient is None:
                continue
            product = (gradient * error).double()
            rows = by_sample and product.dim() > 0 and product.shape[0] == samples
            part = product.flatten(1).sum(1) if rows and product.dim() > 1 else product.sum()
            projections[name] = projections[name] + part if name in projections else part
        for name, energies in self._noise.items():
            projected = projections.get(name)
            energy = 0.0 if projected is None else projected.square().sum().item()
            _add(energies, index, energy)


class _Probe(nn.Module):
    """A float site that records its output and the error of its quantized kernel."""

    def __init__(self, original: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        self.original = original
        self.kernel = kernel
        self.given: list[Tensor] = []
        self.errors: list[Tensor] = []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        result = self.original(*inputs, **named)
        given = floating_tensors(result)
        with torch.no_grad():
            quantized = floating_tensors(self.kernel(*inputs, **named))
            self.errors += [b - a for a, b in zip(given, quantized, strict=True)]
        for tensor in given:
            if not tensor.requires_grad:
                tensor.requires_grad_()
        self.given += given
        return result

    def taken(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The values of the last call, each with its error."""
        given, errors, self.given, self.errors = self.given, self.errors, [], []
        return zip(given, errors, strict=True)


def _add(sums: list[float], index: int, value: float) -> None:
    while len(sums) <= index:
        sums.append(0.0)
    sums[index] += value


@contextmanager
def running(model: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Let calls of one of our models do something else inside the ``with``."""
    own = vars(model)
    former = own.get("forward")
    own["forward"] = update_wrapper(partial(run), model.forward)
    try:
        yield
    finally:
        del own["forward"]
        if former is not None:
            own["forward"] = former
