"""The authors' own DARTS and PC-DARTS, from checkouts outside the project, as opponents.

Their code is loaded where it lies and not altered. It asks for a GPU in so many words, which on the
CPU is answered by staying there; the one call that PyTorch has since renamed is in the training
script, whose few lines of a search step are done here.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.supernet.agreement import Evidence
from benchmarks.supernet.setting import Setting, UnavailableError
from nas.errors import ConfigurationError
from nas.ops.mixed import (
    DIL3,
    DIL5,
    DILATED,
    DILATED3,
    DILATED5,
    EDGES,
    FIRST,
    OPERATIONS,
    REDUCING,
    SECOND,
    SEP3,
    SEP3A,
    SEP3B,
    SEP5,
    SEP5A,
    SEP5B,
    SKIP,
)
from nas.spaces.darts.supernet import Supernet

if TYPE_CHECKING:
    from nas.data import Batch
    from nas.search import BilevelSearch

CHECKOUTS = {
    "darts": (Path("darts", "cnn"), "github.com/quark0/darts"),
    "pcdarts": (Path("pcdarts"), "github.com/yuhuixu1993/PC-DARTS"),
}
PARTIAL = {"darts": 1, "pcdarts": 4}  # K, which their code fixes
# Where the convolutions of an operation stand: in their Sequential, and in our tables as (kernel
# size, depthwise stage, pointwise slot).
CONVOLUTIONS = {
    SEP3: {1: ("depthwise3", FIRST, SEP3A), 5: ("depthwise3", SECOND, SEP3B)},
    SEP5: {1: ("depthwise5", FIRST, SEP5A), 5: ("depthwise5", SECOND, SEP5B)},
    DIL3: {1: ("depthwise3", DILATED, DILATED3)},
    DIL5: {1: ("depthwise5", DILATED, DILATED5)},
}


class Authors:
    """Their network with our weights, stepped as their training script does."""

    def __init__(
        self,
        setting: Setting,
        peers: Path | None,
        search: BilevelSearch,
        train: Batch,
        validation: Batch,
    ) -> None:
        self.twin = copy.deepcopy(search.supernet)
        network, architect = _load_modules(setting, peers)
        self.criterion = nn.CrossEntropyLoss()
        config = setting.supernet
        self.device = search.device
        with _on(self.device), torch.random.fork_rng(devices=()):
            self.model = network.Network(
                config.channels, setting.classes, config.cells, self.criterion
            ).to(self.device)
        load_weights(self.model, self.twin)
        self.clip = search.config.gradient_clip
        self.rate = search.config.learning_rate
        self.architect = architect.Architect(self.model, _arguments(search))
        self.optimiser = torch.optim.SGD(
            self.model.parameters(),
            self.rate,
            momentum=search.config.momentum,
            weight_decay=search.config.weight_decay,
        )
        self.train = (train.images.contiguous(), train.labels)
        self.validation = (validation.images.contiguous(), validation.labels)
        self.model.train()

    def forward(self) -> Tensor:
        self.optimiser.zero_grad()
        images, labels = self.train
        loss: Tensor = self.criterion(self.model(images), labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._architecture_step(unrolled=False)
        self.backward(self.forward())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()

    def second_order(self) -> None:
        with _on(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an old order of arguments
            self._architecture_step(unrolled=True)

    def evidence(self) -> Evidence:
        with torch.no_grad():
            scores = self.model(self.train[0])
        self.backward(self.forward())
        gradient = copy.deepcopy(self.twin)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, place in named_as_theirs(gradient):
                place.copy_(parameters[name].grad)
        self.architect.optimizer.zero_grad()
        self.architect._backward_step(*self.validation)
        architecture = [parameter.grad.flatten() for parameter in self.model.arch_parameters()]
        return Evidence(scores, gradient.weights.detach(), torch.cat(architecture))

    def _architecture_step(self, unrolled: bool) -> None:
        self.architect.step(
            *self.train, *self.validation, self.rate, self.optimiser, unrolled=unrolled
        )


def load_weights(model: Any, supernet: Supernet) -> None:
    """Give ``model``, a network of the authors, the weights and alphas of ``supernet``.

    Raises:
        ConfigurationError: its parameters are not those of the published network.
    """
    parameters = dict(model.named_parameters())
    ours = dict(named_as_theirs(supernet))
    if parameters.keys() != ours.keys():
        odd = sorted(parameters.keys() ^ ours.keys())
        raise ConfigurationError(
            f"the authors' network is not the one this benchmark knows: {len(odd)} parameters "
            f"have no twin, such as '{odd[0]}'; check out the last version of their repository"
        )
    pieces = [piece for part in supernet.architecture_parameters() for piece in part]
    with torch.no_grad():
        for name, value in ours.items():
            parameters[name].copy_(value)
        for theirs, piece in zip(model.arch_parameters(), pieces, strict=True):
            theirs.copy_(piece)


def named_as_theirs(supernet: Supernet) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the authors' names and in their layout, as views that can be written to."""
    packed = dict(supernet.named_weights())
    yield "stem.0.weight", packed["stem.filters"].permute(3, 2, 0, 1)
    yield "stem.1.weight", packed["stem.scale"]
    yield "stem.1.bias", packed["stem.shift"]
    yield "classifier.weight", packed["classifier.matrix"].t()
    yield "classifier.bias", packed["classifier.bias"]
    for index, plan in enumerate(supernet.plans):
        prefix = f"cells.{index}."
        tables = {name: packed[prefix + name] for name in plan.weights.shapes}
        for number, halve in ((0, plan.previous_reduction), (1, False)):
            place = f"{prefix}preprocess{number}"
            yield from _dense(place, tables[f"preprocess{number}"], halve)
        for edge in range(len(EDGES)):
            yield from _edge(f"{prefix}_ops.{edge}._ops", tables, edge)


def _edge(prefix: str, tables: Mapping[str, Tensor], edge: int) -> Iterator[tuple[str, Tensor]]:
    if "reduce" in tables and edge in REDUCING:
        yield from _dense(f"{prefix}.{SKIP}", tables["reduce"][REDUCING.index(edge)], halve=True)
    for operation, convolutions in CONVOLUTIONS.items():
        for place, (table, stage, slot) in convolutions.items():
            taps = tables[table][edge, stage].permute(2, 0, 1).unsqueeze(1)
            yield f"{prefix}.{operation}.op.{place}.weight", taps
            matrix = tables["pointwise"][edge, slot]
            yield f"{prefix}.{operation}.op.{place + 1}.weight", matrix.t()[:, :, None, None]


def _dense(place: str, matrix: Tensor, halve: bool) -> Iterator[tuple[str, Tensor]]:
    filters = matrix.t()[:, :, None, None]  # [out, in, 1, 1]
    if halve:
        half = len(filters) // 2
        yield f"{place}.conv_1.weight", filters[:half]
        yield f"{place}.conv_2.weight", filters[half:]
    else:
        yield f"{place}.op.1.weight", filters


def _arguments(search: BilevelSearch) -> SimpleNamespace:
    """What their architect reads from the command line."""
    config = search.config
    return SimpleNamespace(
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        arch_learning_rate=config.architecture_learning_rate,
        arch_weight_decay=config.architecture_weight_decay,
    )


def _load_modules(setting: Setting, peers: Path | None) -> tuple[ModuleType, ModuleType]:
    """Their ``model_search`` and ``architect``.

    Raises:
        UnavailableError: no checkouts were named, or their code cannot build this setting.
        ConfigurationError: the checkout is not where it was said to be.
    """
    if peers is None:
        raise UnavailableError("--peers says where their code is checked out")
    if setting.image_channels != 3:
        raise UnavailableError(
            f"their network takes images of 3 channels, not {setting.image_channels}"
        )
    if setting.size % 4:
        raise UnavailableError(f"their network halves even sizes only, and {setting.size} is odd "
                               "after the first reduction")  # fmt: skip
    if setting.supernet.partial != PARTIAL[setting.method]:
        raise UnavailableError(
            f"their network has K = {PARTIAL[setting.method]}, not {setting.supernet.partial}"
        )
    place, address = CHECKOUTS[setting.method]
    folder = (peers / place).resolve()
    if not (folder / "model_search.py").is_file():
        raise ConfigurationError(
            f"--peers {peers}: there is no {place / 'model_search.py'} in it; it should be a "
            f"checkout of {address}"
        )
    network, architect, genotypes = _import(folder, "model_search", "architect", "genotypes")
    if tuple(genotypes.PRIMITIVES) != OPERATIONS:
        raise ConfigurationError(
            f"the operations of {folder} are {', '.join(genotypes.PRIMITIVES)}, which is not the "
            "published space"
        )
    return network, architect


def _import(folder: Path, *names: str) -> list[ModuleType]:
    """Modules of a folder whose files import each other by bare names, and no trace left.

    Both repositories use the same names: neither may find the other's.
    """
    before = set(sys.modules)
    own = {file.stem for file in folder.glob("*.py")}
    if taken := own & before & {*names, "operations"}:
        raise ConfigurationError(f"modules called {', '.join(sorted(taken))} are loaded already")
    with (
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(sys, "dont_write_bytecode", True),
    ):
        modules = [importlib.import_module(name) for name in names]
    for name in own & (set(sys.modules) - before):
        del sys.modules[name]
    return modules


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On the CPU their ``.cuda()`` stays there; on a GPU they have what they ask for."""
    if device.type != "cpu":
        yield
        return

    def stay(self: Tensor | nn.Module) -> Tensor | nn.Module:
        return self

    with patch.object(Tensor, "cuda", stay), patch.object(nn.Module, "cuda", stay):
        yield
