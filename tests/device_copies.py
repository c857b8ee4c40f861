"""Watches what a GPU would have to wait for, on PyTorch's device of shapes alone ("meta").

That device has no numbers, so that code which reads one of them in Python fails by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class DeviceCopies(TorchDispatchMode):
    """Counts copies of tensors from the CPU to ``META``, and those that would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.waiting = 0

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if operator is torch.ops.aten._to_copy.default:
            self._count(args[0], result, bool(kwargs.get("non_blocking")))
        elif operator is torch.ops.aten.copy_.default:
            self._count(args[1], result, len(args) > 2 and bool(args[2]))
        return result

    def _count(self, source: Tensor, result: Tensor, non_blocking: bool) -> None:
        if source.device.type == "cpu" and result.device.type == "meta":
            self.copies += 1
            self.waiting += not non_blocking
