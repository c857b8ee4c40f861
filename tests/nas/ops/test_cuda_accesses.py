"""How many bytes the emulated CUDA kernels (tests/cuda_emulation) read and write at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated_cells
import native_stems
import pytest
import torch
from native_cells import assert_close, draw_call, run
from torch import Tensor

from nas.errors import NativeError
from nas.ops import mixed
from nas.ops.mixed import CellPlan


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    try:
        emulated_cells.load()
    except NativeError as error:
        pytest.skip(f"cannot compile the emulation: {error}")


def between_reads(images: Tensor) -> Tensor:
    """A copy whose address does not allow reads of 16 bytes."""
    count, channels, *size = images.shape
    memory = torch.empty(images.numel() + 1, dtype=images.dtype)
    copy = memory[1:].view(count, *size, channels).permute(0, 3, 1, 2)
    copy.copy_(images)
    assert copy.data_ptr() % 16 == images.element_size()
    return copy


def unaligned_cells(plans: Any, before: Tensor, previous: Tensor, *rest: Any) -> Tensor:
    return emulated_cells.mixed_cells(plans, before, between_reads(previous), *rest)


def test_cuda_images_may_begin_between_two_reads_of_16_bytes() -> None:
    """The channels would allow such reads, the address does not."""
    call = draw_call(CellPlan(8, 16, 16, 1, True, True), 3)
    assert_close(run(unaligned_cells, call), run(mixed.mixed_cells, call))


BYTES = (1, 2, 4, 8, 16)


def touched() -> dict[int, int]:
    """How often images were read or written since the last call, by the bytes of an access."""
    counts = torch.ops.nas_transfer_emulated.touched()
    return {size: count for size, count in zip(BYTES, counts, strict=True) if count}


kinds = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def count_accesses(plan: CellPlan, dtype: torch.dtype) -> tuple[list[dict[int, int]], set[int]]:
    """How often what is accessed at once, forward and backward, where addresses allow 16 bytes and
    where they do not; and the bytes of single numbers. What both give has the same bits. (In
    evaluation, since sums over a batch have another order then.)"""
    call = draw_call(plan, 3, (6, 5), training=False, edges=plan.partial > 1)
    call = replace(call, weights=0.2 * call.weights)  # nothing leaves the range of float16
    call = call.narrowed(dtype) if dtype.itemsize == 2 else call.to(dtype)
    touched()
    found, counts = [], []
    for twin in (emulated_cells.mixed_cells, unaligned_cells):
        found.append(run(twin, call))
        counts.append(touched())
    for name in ("output", "before", "previous"):
        assert torch.equal(found[0][name], found[1][name]), name
    return counts, {dtype.itemsize, call.weights.itemsize}


@kinds
@pytest.mark.parametrize(
    ("channels", "partial"),
    [(8, 1), (16, 1), (24, 1), (40, 1), (136, 1), (32, 4), (64, 4), (96, 4), (160, 4)],
)
@pytest.mark.parametrize("reduction", [False, True])
def test_cuda_reads_and_writes_16_bytes_at_once(
    channels: int, partial: int, reduction: bool, dtype: torch.dtype
) -> None:
    """Forward and backward, in cells of DARTS and PC-DARTS; but 8 bytes where half of the mixed
    channels, which a reduction sends one way, are no more."""
    plan = CellPlan(8, 16, channels, partial, reduction=reduction, previous_reduction=reduction)
    (wide, single), one_by_one = count_accesses(plan, dtype)
    less = 0
    if reduction:  # the gradients of eight skip connections and of an input
        for pixels, halved in ((8 * 3 * 3, plan.mixed), (6 * 5, channels)):
            less += 3 * pixels * halved // 4 if halved // 2 * dtype.itemsize % 16 else 0
    assert wide.get(8, 0) == less
    assert wide.keys() <= {8, 16}
    assert single.keys() == one_by_one


@kinds
@pytest.mark.parametrize(("channels", "partial"), [(4, 1), (12, 1), (28, 1), (16, 4), (48, 4)])
@pytest.mark.parametrize("reduction", [False, True])
def test_cuda_reads_and_writes_four_channels_at_once(
    channels: int, partial: int, reduction: bool, dtype: torch.dtype
) -> None:
    """Where they are no multiple of eight, which is 8 bytes in half precision; and in a reduction's
    halves two."""
    plan = CellPlan(8, 16, channels, partial, reduction=reduction, previous_reduction=False)
    (wide, single), one_by_one = count_accesses(plan, dtype)
    least = dtype.itemsize * (2 if reduction else 4)
    assert min(wide) == min(least, 16)
    assert single.keys() == one_by_one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [16, 48])
def test_cuda_what_is_not_cut_into_groups_of_four_goes_16_bytes_at_once(
    channels: int, dtype: torch.dtype
) -> None:
    """Of images of half precision: a cell's inputs, what it makes of them, and nodes after the
    shuffle. So two accesses of four numbers become one."""
    plan = CellPlan(channels, channels, channels, 4, reduction=False, previous_reduction=False)
    (half, _), _ = count_accesses(plan, dtype)
    (single, _), _ = count_accesses(plan, torch.float32)
    images = 3 * 6 * 5 * channels // 8
    # forward: inputs, states, and these normalised; backward: states, inputs and their gradients,
    # which are read once for sums, once with states and inputs, and written
    inputs = 2 * images * (4 + 6)
    nodes = 4 * images * (1 + 1)  # written, and their gradients read
    assert sum(single.values()) - sum(half.values()) == inputs + nodes


@kinds
@pytest.mark.parametrize("partial", [2, 8])
def test_cuda_other_parts_than_a_quarter_are_shuffled_one_by_one(
    partial: int, dtype: torch.dtype
) -> None:
    """The nodes' channels after the shuffle forward, before it backward, and nothing else."""
    plan = CellPlan(8, 16, 16 * partial, partial, reduction=False, previous_reduction=False)
    (wide, single), one_by_one = count_accesses(plan, dtype)
    assert wide.keys() == {16, *one_by_one}
    nodes = 4 * 3 * 6 * 5 * plan.channels  # numbers of all
    assert sum(count for size, count in wide.items() if size < 16) == 2 * nodes
    assert single.keys() == one_by_one


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "width", "outputs"), [(3, 32, 48), (1, 5, 8), (5, 3, 24)])
def test_cuda_stem_reads_and_writes_16_bytes_at_once(
    inputs: int, width: int, outputs: int, stored: torch.dtype
) -> None:
    """And gives the same bits as where the images' address does not allow it."""
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    values = native_stems.draw(5, inputs, outputs, (7, width))
    values = {name: x.to(dtype) for name, x in values.items()}

    def unaligned(images: Tensor, *rest: Any) -> Tensor:
        return emulated_cells.stem(between_reads(images), *rest)

    touched()
    wide, single = (
        (native_stems.run(twin, values, training=False, stored=stored), touched())
        for twin in (emulated_cells.stem, unaligned)
    )
    assert wide[1].keys() == {16}
    assert single[1].keys() == {dtype.itemsize, stored.itemsize}
    assert torch.equal(wide[0]["output"], single[0]["output"])
    for name in ("weights", "mean", "variance"):
        torch.testing.assert_close(wide[0][name], single[0][name])
