"""What a search step must cost at least on this machine: its arithmetic and its traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.supernet.machine import copy_gigabytes, matrix_gflops
from benchmarks.supernet.setting import BACKWARD, FORWARD, SECOND_ORDER, STEP, Setting
from nas.ops.mixed import EDGES, REDUCING, CellPlan
from nas.spaces.darts.supernet import Supernet

FLOAT = 4  # bytes
ARCHITECTURE = "architecture step"
# Passes of each phase: forward, gradients of activations, gradients of weights. The architecture
# step asks for no gradient of the weights; second order is an unrolled step, a validation gradient
# by both, and two architecture gradients.
PASSES = {
    FORWARD: (1, 0, 0),
    BACKWARD: (0, 1, 1),
    ARCHITECTURE: (1, 1, 0),
    STEP: (2, 2, 1),
    SECOND_ORDER: (4, 4, 2),
}


@dataclass(frozen=True)
class Rates:
    """What was measured on this machine, with ``threads`` threads."""

    threads: int
    gflops: float  # of a float32 matrix product
    copy_gb_s: float  # read and written
    trusted: bool = True  # the probe of the second core was clean before and after


@dataclass(frozen=True)
class Floor:
    """The least that a phase must do, and how long this machine takes for it.

    Attributes:
        gflop: 10^9 multiplications and additions of all convolutions.
        gigabytes: read and written if every state crosses memory once a pass and direction.
        arithmetic_ms, memory_ms: at the machine's best rates.
    """

    setting: Setting
    phase: str
    threads: int
    gflop: float
    gigabytes: float
    arithmetic_ms: float
    memory_ms: float

    @property
    def milliseconds(self) -> float:
        """The higher of the two: at best, traffic hides behind arithmetic or the other way."""
        return max(self.arithmetic_ms, self.memory_ms)

    def to_json(self) -> dict[str, Any]:
        """One flat row."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**self.setting.columns, **{k: v for k, v in values.items() if k != "setting"}}


def measure_rates(threads: int, probe: Callable[[], bool] | None, tries: int = 5) -> Rates:
    """The machine's best rates; with two threads, of a moment in which both cores are there."""
    for _ in range(tries):
        before = probe is None or probe()
        gflops, copy = matrix_gflops(threads), copy_gigabytes(threads)
        rates = Rates(threads, gflops, copy, before and (probe is None or probe()))
        if rates.trusted:
            break
    return rates


def find_floors(setting: Setting, rates: Rates) -> list[Floor]:
    """The floors of every phase of ``setting``."""
    supernet = Supernet(setting.shape, setting.supernet, seed=0)
    floors = []
    for phase in (FORWARD, BACKWARD, ARCHITECTURE, STEP, SECOND_ORDER):
        if phase == SECOND_ORDER and not setting.second_order:
            continue
        gflop, gigabytes = work(supernet, setting.batch, phase)
        floors.append(
            Floor(
                setting,
                phase,
                rates.threads,
                gflop,
                gigabytes,
                1000 * gflop / rates.gflops,
                1000 * gigabytes / rates.copy_gb_s,
            )
        )
    return floors


def work(
    supernet: Supernet, batch: int, phase: str = STEP, bytes_each: int = FLOAT
) -> tuple[float, float]:
    """GFLOP and gigabytes that ``phase`` must do at least, see :class:`Floor`; ``bytes_each`` is
    what a number of an image takes."""
    forward, inputs, of_weights = PASSES[phase]
    passes = forward + inputs + of_weights
    operations = 2 * batch * multiply_adds(supernet) * passes
    # Forward a state is written and read; backward it and its gradient are read, and a gradient is
    # written. Weights are read in either direction, and their gradients written.
    states = bytes_each * batch * state_elements(supernet) * (2 * forward + 3 * inputs)
    weights = FLOAT * supernet.weights.numel() * passes
    return 1e-9 * operations, 1e-9 * (states + weights)


def multiply_adds(supernet: Supernet) -> int:
    """Multiply-adds of all convolutions and the classifier, forward, for one image."""
    shape = supernet.shape
    pixels = _resolutions(supernet)
    total = 9 * shape.channels * supernet.plans[0].previous * pixels[0]
    for plan, before, after in zip(supernet.plans, pixels, pixels[1:], strict=False):
        total += (plan.before_previous + plan.previous) * plan.channels * before
        total += _edge_multiply_adds(plan) * after
    rows, columns = supernet.classifier.shapes["matrix"]
    return total + rows * columns


def state_elements(supernet: Supernet) -> int:
    """Elements of all states for one image: the stem's output, two inputs and four nodes a cell."""
    pixels = _resolutions(supernet)
    total = supernet.plans[0].previous * pixels[0]
    for plan, before, after in zip(supernet.plans, pixels, pixels[1:], strict=False):
        total += plan.channels * (2 * before + 4 * after)
    return total


def _edge_multiply_adds(plan: CellPlan) -> int:
    """Of all edges of a cell, for one pixel of its output."""
    c = plan.mixed
    depthwise = 3 * (3 * 3 + 5 * 5) * c  # two in a separable convolution, one in a dilated
    reducing = len(REDUCING) * c * c if plan.reduction else 0
    return len(EDGES) * (depthwise + 6 * c * c) + reducing


def _resolutions(supernet: Supernet) -> list[int]:
    """Pixels of the images and of the output of each cell."""
    height, width = supernet.shape.height, supernet.shape.width
    pixels = [height * width]
    for plan in supernet.plans:
        if plan.reduction:
            height, width = (height + 1) // 2, (width + 1) // 2
        pixels.append(height * width)
    return pixels
