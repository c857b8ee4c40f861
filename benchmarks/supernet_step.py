"""How long a search step of the supernet takes, by whom, and how much memory it needs.

    python -m benchmarks.supernet_step [--json FILE] [--picture FILE] [--peers PATH] [--floors]

The implementations take turns in one process; peak memory is measured in a process for each. With
--peers, the authors' own DARTS and PC-DARTS take part, checked out as PATH/darts
(github.com/quark0/darts) and PATH/pcdarts (github.com/yuhuixu1993/PC-DARTS). Before anything is
timed, all must compute the same from the same weights. Two-thread times count only while a probe
sees two cores: rows marked "?" are those in which it did not.

Without --size, --batch and --embedded: 32x32 at batch 8 and 64, and the search of `make transfer`.
That takes an hour or two; `--size 32 --batch 8` is the heart of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.supernet.agreement import check_agreement
from benchmarks.supernet.floors import Floor, Rates, find_floors, measure_rates
from benchmarks.supernet.machine import describe_machine, load_average, second_core_is_there
from benchmarks.supernet.memory import Memory, measure_memory
from benchmarks.supernet.opponents import (
    IMPLEMENTATIONS,
    Opponent,
    make_opponent,
    phases_of,
    stored_in,
    take_turn,
)
from benchmarks.supernet.report import Row, draw, floor_tables, row_tables, write_json
from benchmarks.supernet.setting import (
    METHODS,
    Setting,
    UnavailableError,
    embedded_setting,
    paper_setting,
    quick_setting,
)
from benchmarks.supernet.timing import Budget, summarise, take_turns
from nas.errors import ConfigurationError, NASError
from pipeline.console import CONSOLE, complain, say

TABLE_WIDTH = 120  # also where there is no terminal to be as wide as
QUICK = Budget(warmups=1, repetitions=3, least=2, seconds=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure_all(options, options.cache or Path(folder))
    except NASError as error:
        complain(str(error))
        return 1
    return 0


def _measure_all(options: argparse.Namespace, cache: Path) -> None:
    _check(options)
    machine = describe_machine()
    say("{cpu}, {cores} cores, torch {torch}, load {load}".format(**machine))
    budget = QUICK if options.quick else Budget(repetitions=options.repetitions)
    rows: list[Row] = []
    rates: list[Rates] = []
    floors: list[Floor] = []
    settings = _settings(options)
    for threads in options.threads:
        # Compiled code is made for one number of threads. The processes for memory, which come
        # first, share it.
        torch.compiler.reset()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / str(threads))
        if options.floors:
            rates.append(measure_rates(threads, _probe(threads)))
            floors += [floor for setting in settings for floor in find_floors(setting, rates[-1])]
        for setting in settings:
            rows += _measure(setting, threads, options.implementations, options.peers, budget)
            if options.json:
                write_json(options.json, machine, rows, rates, floors)
    rows.sort(key=lambda row: settings.index(row.setting))
    for table in (*row_tables(rows), *floor_tables(floors, rates, rows)):
        Console(width=max(TABLE_WIDTH, CONSOLE.width), highlight=False).print(table)
    if options.picture and rows:
        draw(rows, options.picture)


def _measure(
    setting: Setting, threads: int, names: Sequence[str], peers: Path | None, budget: Budget
) -> list[Row]:
    """The rows of one setting with one number of threads."""
    torch.set_num_threads(threads)
    say(f"{setting.label}, {threads} thread{'s' * (threads > 1)}, load {load_average()}")
    reference = make_opponent("eager", setting).evidence()
    opponents: dict[str, Opponent] = {}
    memory: dict[str, Memory] = {}
    for name in names:
        try:
            opponent = make_opponent(name, setting, peers)
            memory[name] = measure_memory(name, setting, threads, peers)
        except UnavailableError as error:
            say(f"  {name} is left out: {error}")
            continue
        check_agreement(name, opponent.evidence(), reference, stored_in(name))
        opponents[name] = opponent
        if name == "compile":
            say(f"  compile: {memory[name].first_seconds:.0f} s until the first turn was over")
    turns = {
        name: partial(take_turn, opponent, phases_of(name, setting))
        for name, opponent in opponents.items()
    }
    samples = take_turns(turns, budget, _probe(threads))
    load = load_average()
    return [
        Row(
            setting,
            name.partition(" ")[0],
            stored_in(name),
            phase,
            threads,
            summarise(samples[name], phase, budget.least),
            memory[name],
            load,
        )
        for phase in setting.phases
        for name in opponents
        if phase in phases_of(name, setting)
    ]


def _check(options: argparse.Namespace) -> None:
    """What would otherwise fail after hours.

    Raises:
        ConfigurationError: an option that cannot work.
    """
    cores = os.cpu_count() or 1
    for threads in options.threads:
        if not 1 <= threads <= cores:
            raise ConfigurationError(f"--threads {threads}: this machine has 1 to {cores}")
    if options.repetitions < Budget.least:
        raise ConfigurationError(
            f"--repetitions {options.repetitions}: a median needs at least {Budget.least}"
        )
    for name in ("size", "batch"):
        value = getattr(options, name)
        if value is not None and value < 2:
            raise ConfigurationError(f"--{name} {value} must be at least 2")
    for file in (options.json, options.picture):
        if file and not file.absolute().parent.is_dir():
            raise ConfigurationError(f"there is no folder {file.parent} to write {file.name} to")


def _probe(threads: int) -> Callable[[], bool] | None:
    """What says whether the machine is whole: of one core it always is."""
    return second_core_is_there if threads > 1 else None


def _settings(options: argparse.Namespace) -> list[Setting]:
    """What to measure, in the order of the report."""
    methods = [options.method] if options.method else METHODS
    if options.quick:
        return [quick_setting(method) for method in methods]
    if options.embedded:
        return [embedded_setting(method) for method in methods]
    if options.size or options.batch:
        size, batch = options.size or 32, options.batch or 8
        return [paper_setting(method, size, batch, second_order=True) for method in methods]
    settings = []
    for method in methods:
        settings.append(paper_setting(method, 32, 8, second_order=True))
        settings.append(paper_setting(method, 32, 64, second_order=False))
        settings.append(embedded_setting(method))
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supernet_step",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the rows as JSON, after each setting")
    add(
        "--cache",
        type=Path,
        metavar="PATH",
        help="keep what torch.compile makes there, which takes minutes, for later runs",
    )
    add("--picture", type=Path, metavar="FILE", help="draw the search step and its memory")
    add("--peers", type=Path, metavar="PATH", help="where the authors' code is checked out")
    add("--floors", action="store_true", help="compare with what this machine could do at best")
    add("--quick", action="store_true", help="a tiny supernet, seconds: does everything work?")
    add("--embedded", action="store_true", help="the search of `make transfer` alone")
    add("--method", choices=METHODS, help="one of the two; default: both")
    add("--size", type=int, help="pixels a side of the paper's supernet (16 channels, 8 cells)")
    add("--batch", type=int, help="its batch")
    add("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    add(
        "--repetitions",
        type=int,
        default=Budget.repetitions,
        help="turns of each (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
