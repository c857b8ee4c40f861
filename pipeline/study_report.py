"""The report of a warm-start study: tables and pictures, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nas.checkpoint import write_atomically
from nas.statistics import Difference, Interval, paired_difference, proportion_interval
from nas.study.analysis import (
    Race,
    Row,
    distance_correlation,
    matched,
    quartiles,
    races,
    speed_ups,
)
from nas.study.warm_start import FARTHEST, FULL, MULTI, NEAREST, RANDOM, REDUCED, SCRATCH, STARTS
from pipeline.figures import draw_distance_effect, draw_mean_curves, draw_pairs, draw_speed_ups

REPORT = "report.md"
WARM = tuple(start for start in STARTS if start != SCRATCH)
SINGLE = (NEAREST, RANDOM, FARTHEST)
# What is retrained: the warm search, the one from scratch, and what the two budgets are called.
RETRAINED = {
    "equal budget": ((NEAREST, FULL), (SCRATCH, FULL)),
    "reduced against full": ((NEAREST, REDUCED), (SCRATCH, FULL)),
    "reduced budget, both": ((NEAREST, REDUCED), (SCRATCH, REDUCED)),
}


def write_report(rows: Sequence[Row], planned: int, folder: Path) -> list[Path]:
    """Write the report and its pictures to ``folder``; returns their paths, the report's first.

    Args:
        planned: number of rows of the whole design.
    """
    found = races(rows)
    sections = [
        [
            "# Warm starts beside searches from scratch",
            "",
            f"{len(rows)} of {planned} rows. Written from `results.csv` by the study itself.",
        ],
        _speed_section(found),
        _target_section(found),
        _rival_section(rows, found),
        _retrained_section(rows),
        _distance_section(found),
    ]
    pictures = dict(_pictures(rows, found))
    shown = [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    text = "\n\n".join("\n".join(section) for section in [*sections, shown] if section)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / name)
    write_atomically(folder / REPORT, f"{text}\n".encode())
    return [folder / REPORT, *(folder / name for name in pictures)]


def _speed_section(found: Sequence[Race]) -> list[str]:
    lines = [
        "## Speed-up",
        "Epochs until the search from scratch had reached its final validation accuracy for the "
        "first time, over epochs until the warm one had. A search that never reached it counts as "
        "0. Seconds are as measured, whatever else the machine did.",
        "",
        "| start | method | races | reached | median | quartiles | range | faster (95%) | "
        "median in seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    methods = list(dict.fromkeys(race.warm.method for race in found))
    for start in WARM:
        for chosen in [methods, *([method] for method in methods if len(methods) > 1)]:
            own = [r for r in found if r.warm.start == start and r.warm.method in chosen]
            if own:
                summary = speed_ups(own)
                low, middle, high = summary.quartiles
                lines.append(
                    f"| {start} | {' and '.join(chosen)} | {summary.races} | {summary.reached} | "
                    f"**{middle:.2f}** | {low:.2f} to {high:.2f} | {summary.lowest:.2f} to "
                    f"{summary.highest:.2f} | {_share(summary.faster)} | "
                    f"{summary.in_seconds:.2f} |"
                )
    return lines


def _target_section(found: Sequence[Race]) -> list[str]:
    lines = [
        "## By target",
        "Medians over methods and seeds; the goal is the final validation accuracy from scratch.",
        "",
        f"| target | goal | epochs from scratch | {' | '.join(WARM)} | nearest source |",
        "|---" * (4 + len(WARM)) + "|",
    ]
    for target in dict.fromkeys(race.warm.target for race in found):
        own = [race for race in found if race.warm.target == target]
        medians = [
            _number(quartiles([r.speed_up for r in own if r.warm.start == start])[1])
            for start in WARM
        ]
        nearest = sorted({r.warm.source for r in own if r.warm.start == NEAREST})
        lines.append(
            f"| {target} | {quartiles([r.goal for r in own])[1]:.1%} | "
            f"{quartiles([r.scratch_epochs for r in own])[1]:.1f} | {' | '.join(medians)} | "
            f"{', '.join(nearest)} |"
        )
    return lines


def _rival_section(rows: Sequence[Row], found: Sequence[Race]) -> list[str]:
    lines = [
        "## Nearest against the other beginnings",
        "Same target, method and seed, full budget; Student's 95% interval of the mean difference, "
        "Wilcoxon's signed-rank test.",
        "",
        "| nearest less | pairs | speed-up | p | final validation accuracy, points | p |",
        "|---|---|---|---|---|---|",
    ]
    by_start = {
        start: {r.warm.block: r.speed_up for r in found if r.warm.start == start} for start in WARM
    }
    for rival in (RANDOM, FARTHEST, MULTI, SCRATCH):
        pairs = matched(rows, (NEAREST, FULL), (rival, FULL))
        if not pairs:
            continue
        accuracy = paired_difference(
            [100 * own.final_accuracy for own, _ in pairs],
            [100 * other.final_accuracy for _, other in pairs],
        )
        speed = "| | "
        blocks = [b for b in by_start[NEAREST] if b in by_start.get(rival, {})]
        if blocks:
            difference = paired_difference(
                [by_start[NEAREST][b] for b in blocks], [by_start[rival][b] for b in blocks]
            )
            speed = f"| {_difference(difference)} | {_p(difference)} "
        lines.append(
            f"| {rival} | {len(pairs)} {speed}| {_difference(accuracy)} | {_p(accuracy)} |"
        )
    return lines


def _retrained_section(rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Retrained networks",
        "Test accuracy of networks made of the cells that were found, nearest source less scratch, "
        "in points. Budgets are epochs of the search; the training is the same.",
        "",
        "| budget of the search | pairs | scratch | warm | difference | p | positive transfers "
        "(95%) | ties |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, (warm, scratch) in RETRAINED.items():
        pairs = _tested(rows, warm, scratch)
        if not pairs:
            continue
        base, ours = zip(*pairs, strict=True)
        difference = paired_difference([100 * x for x in ours], [100 * x for x in base])
        better = proportion_interval(sum(w > s for s, w in pairs), len(pairs))
        lines.append(
            f"| {title} | {len(pairs)} | {sum(base) / len(base):.2%} | "
            f"{sum(ours) / len(ours):.2%} | {_difference(difference)} | {_p(difference)} | "
            f"{_share(better)} | {sum(w == s for s, w in pairs)} |"
        )
    return lines


def _distance_section(found: Sequence[Race]) -> list[str]:
    over_all, within = distance_correlation(found)
    return [
        "## Distance",
        f"Spearman's correlation of distance and speed-up over the races from a single source: "
        f"{_number(over_all)}; mean of the correlations among the three sources of the same "
        f"target, method and seed: {_number(within)}. Negative means that nearer is faster.",
    ]


def _pictures(rows: Sequence[Row], found: Sequence[Race]) -> Iterator[tuple[str, Figure]]:
    """Those that there are rows for."""
    by_start = {start: [r for r in found if r.warm.start == start] for start in WARM}
    ran = {start: own for start, own in by_start.items() if own}
    if ran:
        yield (
            "speed-ups.png",
            draw_speed_ups(
                {start: sorted(race.speed_up for race in own) for start, own in ran.items()}
            ),
        )
        if curves := _curves(rows, [SCRATCH, *ran]):
            yield "curves.png", draw_mean_curves(curves)
    single = {start: own for start, own in ran.items() if start in SINGLE}
    if single:
        points = {
            start: [(race.warm.distance, race.speed_up) for race in own]
            for start, own in single.items()
        }
        yield "distance.png", draw_distance_effect(points)
    tested = {title: _tested(rows, *both) for title, both in RETRAINED.items()}
    if any(tested.values()):
        yield "retrained.png", draw_pairs({title: own for title, own in tested.items() if own})


def _curves(rows: Sequence[Row], starts: Sequence[str]) -> dict[str, list[tuple[float, ...]]]:
    """Of the targets, methods and seeds that all ``starts`` have."""
    full = [row for row in rows if row.budget == FULL]
    common = set.intersection(*({r.block for r in full if r.start == s} for s in starts))
    curves = {
        start: [r.accuracies for r in full if r.start == start and r.block in common]
        for start in starts
    }
    return curves if common else {}


def _tested(
    rows: Sequence[Row], warm: tuple[str, str], scratch: tuple[str, str]
) -> list[tuple[float, float]]:
    """(scratch, warm) test accuracies."""
    return [
        (other.test_accuracy, own.test_accuracy)
        for own, other in matched(rows, warm, scratch)
        if not math.isnan(own.test_accuracy + other.test_accuracy)
    ]


def _share(share: Interval) -> str:
    return f"{share.mean:.0%} ({share.low:.0%} to {share.high:.0%})"


def _difference(difference: Difference) -> str:
    bounds = f"{difference.low:+.2f} to {difference.high:+.2f}"
    return f"{difference.mean:+.2f} ({'one pair' if math.isnan(difference.low) else bounds})"


def _p(difference: Difference) -> str:
    return _number(difference.p_value, 3)


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
