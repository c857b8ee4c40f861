"""The report of a warm-start study: tables and pictures, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from nas.checkpoint import write_atomically
from nas.statistics import Difference, Interval, paired_difference, proportion_interval
from nas.study.analysis import (
    Race,
    Row,
    distance_correlation,
    gains,
    matched,
    quartiles,
    races,
    speed_ups,
)
from nas.study.warm_start import (
    FARTHEST,
    MULTI,
    NEAREST,
    RANDOM,
    SCRATCH,
    STARTS,
    WarmStartStudy,
)
from pipeline.figures import draw_distance_effect, draw_mean_curves, draw_pairs, draw_speed_ups

REPORT = "report.md"
WARM = tuple(start for start in STARTS if start != SCRATCH)
SINGLE = (NEAREST, RANDOM, FARTHEST)


def write_report(rows: Sequence[Row], design: WarmStartStudy, folder: Path) -> list[Path]:
    """Write the report and its pictures to ``folder``; returns their paths, the report's first."""
    found = races(rows, design.budgets, design.full_epochs)
    sections = [
        [
            "# Warm starts beside searches from scratch",
            "",
            f"{len(rows)} of {len(design.cells())} rows. Written from `results.csv` by the study "
            "itself.",
        ],
        _speed_section(found, design),
        _reduced_section(rows, design),
        _target_section(found),
        _rival_section(rows, found, design),
        _retrained_section(rows, design),
        _unit_section(rows, design),
        _distance_section(rows, found, design),
    ]
    pictures = dict(_pictures(rows, found, design))
    shown = [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    text = "\n\n".join("\n".join(section) for section in [*sections, shown] if section)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / name)
    write_atomically(folder / REPORT, f"{text}\n".encode())
    return [folder / REPORT, *(folder / name for name in pictures)]


def _speed_section(found: Sequence[Race], design: WarmStartStudy) -> list[str]:
    *some, last = map(str, design.budgets)
    lines = [
        "## Speed-up",
        f"The {design.full_epochs} epochs of a search from scratch over the epochs of the shortest "
        "warm search that ends with at least its final validation accuracy. Warm searches have "
        f"{', '.join(some)} or {last} epochs, each with a schedule of its own; where none gets "
        "there the speed-up counts as 0. Seconds are those of a processor. The lower bound "
        "divides the epochs after which the search from scratch first had its final accuracy.",
        "",
        "| start | method | races | reached | median | quartiles | range | 4 or more (95%) | "
        "median in seconds | median lower bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for start, methods, own in _groups(found):
        summary = speed_ups(own)
        low, middle, high = summary.quartiles
        lines.append(
            f"| {start} | {methods} | {summary.races} | {summary.reached} | **{middle:.2f}** | "
            f"{low:.2f} to {high:.2f} | {summary.lowest:.2f} to {summary.highest:.2f} | "
            f"{_share(summary.fourfold)} | {summary.in_seconds:.2f} | "
            f"{summary.from_first_touch:.2f} |"
        )
    return lines


def _groups(found: Sequence[Race]) -> Iterator[tuple[str, str, list[Race]]]:
    """(start, methods, races) of every start, over all methods and then by each."""
    methods = list(dict.fromkeys(race.scratch.method for race in found))
    for start in WARM:
        for chosen in [methods, *([method] for method in methods if len(methods) > 1)]:
            own = [r for r in found if r.start == start and r.scratch.method in chosen]
            if {race.scratch.method for race in own} == set(chosen):
                yield start, " and ".join(chosen), own


def _reduced_section(rows: Sequence[Row], design: WarmStartStudy) -> list[str]:
    """What needs no choice among budgets: every warm search of the reduced one."""
    lines = [
        f"## Searches of {design.reduced_epochs} epochs",
        f"Final validation accuracy, less that of the {design.full_epochs} epochs from scratch, in "
        "points: one budget for all, so that nothing is picked. Student's 95% interval, Wilcoxon's "
        "signed-rank test.",
        "",
        "| start | method | pairs | difference | p | no lower (95%) |",
        "|---|---|---|---|---|---|",
    ]
    methods = list(dict.fromkeys(row.method for row in rows))
    for start in STARTS:
        pairs = matched(rows, (start, design.reduced_epochs), (SCRATCH, design.full_epochs))
        for chosen in [methods, *([method] for method in methods if len(methods) > 1)]:
            own = [
                (warm.final_accuracy, whole.final_accuracy)
                for warm, whole in pairs
                if warm.method in chosen
            ]
            if {warm.method for warm, _ in pairs} >= set(chosen):
                difference = paired_difference([100 * w for w, _ in own], [100 * s for _, s in own])
                no_lower = proportion_interval(sum(w >= s for w, s in own), len(own))
                lines.append(
                    f"| {start} | {' and '.join(chosen)} | {len(own)} | {_difference(difference)} "
                    f"| {_p(difference)} | {_share(no_lower)} |"
                )
    return lines


def _target_section(found: Sequence[Race]) -> list[str]:
    lines = [
        "## By target",
        "Medians over methods and seeds; the goal is the final validation accuracy from scratch.",
        "",
        f"| target | goal | first had from scratch | {' | '.join(WARM)} | nearest source |",
        "|---" * (4 + len(WARM)) + "|",
    ]
    for target in dict.fromkeys(race.scratch.target for race in found):
        own = [race for race in found if race.scratch.target == target]
        medians = [
            _number(quartiles([r.speed_up for r in own if r.start == start])[1]) for start in WARM
        ]
        nearest = sorted({r.warm[0].source for r in own if r.start == NEAREST})
        lines.append(
            f"| {target} | {quartiles([r.goal for r in own])[1]:.1%} | after "
            f"{quartiles([float(r.first_touch) for r in own])[1]:.1f} epochs | "
            f"{' | '.join(medians)} | {', '.join(nearest)} |"
        )
    return lines


def _rival_section(rows: Sequence[Row], found: Sequence[Race], design: WarmStartStudy) -> list[str]:
    lines = [
        "## Nearest against the other beginnings",
        "Same target, method and seed; Student's 95% interval of the mean difference, Wilcoxon's "
        "signed-rank test.",
        "",
        f"| nearest less | pairs | speed-up | p | pairs | validation accuracy after "
        f"{design.reduced_epochs} epochs, points | p |",
        "|---|---|---|---|---|---|---|",
    ]
    by_start = {
        start: {r.scratch.block: r.speed_up for r in found if r.start == start} for start in WARM
    }
    for rival in (RANDOM, FARTHEST, MULTI, SCRATCH):
        pairs = matched(rows, (NEAREST, design.reduced_epochs), (rival, design.reduced_epochs))
        if not pairs:
            continue
        accuracy = paired_difference(
            [100 * own.final_accuracy for own, _ in pairs],
            [100 * other.final_accuracy for _, other in pairs],
        )
        speed = "| | | "
        blocks = [b for b in by_start[NEAREST] if b in by_start.get(rival, {})]
        if blocks:
            difference = paired_difference(
                [by_start[NEAREST][b] for b in blocks], [by_start[rival][b] for b in blocks]
            )
            speed = f"| {len(blocks)} | {_difference(difference)} | {_p(difference)} "
        lines.append(
            f"| {rival} {speed}| {len(pairs)} | {_difference(accuracy)} | {_p(accuracy)} |"
        )
    return lines


def _compared(design: WarmStartStudy) -> dict[str, tuple[tuple[str, int], tuple[str, int]]]:
    """What is retrained: a warm search, one from scratch, and what the pair is called."""
    full, reduced = design.full_epochs, design.reduced_epochs
    return {
        f"nearest {full}, scratch {full}": ((NEAREST, full), (SCRATCH, full)),
        f"nearest {reduced}, scratch {full}": ((NEAREST, reduced), (SCRATCH, full)),
        f"nearest {reduced}, scratch {reduced}": ((NEAREST, reduced), (SCRATCH, reduced)),
        f"multi {reduced}, scratch {full}": ((MULTI, reduced), (SCRATCH, full)),
        f"multi {reduced}, scratch {reduced}": ((MULTI, reduced), (SCRATCH, reduced)),
    }


def _retrained_section(rows: Sequence[Row], design: WarmStartStudy) -> list[str]:
    lines = [
        "## Retrained networks",
        "Test accuracy of networks made of the cells that were found, warm less scratch, in "
        "points. Numbers are epochs of the search; the training is the same.",
        "",
        "| searches | pairs | scratch | warm | difference | p | positive transfers (95%) | ties |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, (warm, scratch) in _compared(design).items():
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


def _unit_section(rows: Sequence[Row], design: WarmStartStudy) -> list[str]:
    """The same differences where each target counts once."""
    reduced, full = design.reduced_epochs, design.full_epochs
    validated = [
        ((MULTI, reduced), (SCRATCH, full)),
        ((NEAREST, reduced), (SCRATCH, full)),
        *(((NEAREST, reduced), (rival, reduced)) for rival in (RANDOM, FARTHEST, MULTI)),
    ]
    lines = [
        "## Targets as the unit",
        "Searches on one target are no independent witnesses. Here each target counts once, by the "
        "mean of its differences over methods and seeds; in points.",
        "",
        "| accuracy | searches | targets | difference | p |",
        "|---|---|---|---|---|",
    ]
    for kind, compared in (("validation", validated), ("test", list(_compared(design).values()))):
        for first, second in compared:
            by_target: dict[str, list[float]] = {}
            for own, other in matched(rows, first, second):
                difference = _accuracy(own, kind) - _accuracy(other, kind)
                if not math.isnan(difference):
                    by_target.setdefault(own.target, []).append(100 * difference)
            if len(by_target) > 1:
                means = [fmean(values) for values in by_target.values()]
                whole = paired_difference(means, [0.0] * len(means))
                title = f"{first[0]} {first[1]} less {second[0]} {second[1]}"
                lines.append(
                    f"| {kind} | {title} | {len(means)} | {_difference(whole)} | {_p(whole)} |"
                )
    return lines


def _accuracy(row: Row, kind: str) -> float:
    return row.test_accuracy if kind == "test" else row.final_accuracy


def _gains(rows: Sequence[Row], start: str, design: WarmStartStudy) -> list[tuple[Row, float]]:
    return gains(rows, start, design.reduced_epochs, design.full_epochs)


def _distance_section(
    rows: Sequence[Row], found: Sequence[Race], design: WarmStartStudy
) -> list[str]:
    reduced = design.reduced_epochs
    lines = [
        "## Distance",
        "Spearman's correlation with the distance of the source: over all searches from a single "
        "source, and the mean of those among the three sources of the same target, method and "
        "seed. Negative means that nearer is better.",
        "",
        "| distance with | searches | over all | within |",
        "|---|---|---|---|",
    ]
    speed = [(race.warm[0], race.speed_up) for race in found if race.start in SINGLE]
    gained = [pair for start in SINGLE for pair in _gains(rows, start, design)]
    for title, worth in (
        ("speed-up", speed),
        (f"accuracy after {reduced} epochs less the goal", gained),
    ):
        over_all, within = distance_correlation(worth)
        lines.append(f"| {title} | {len(worth)} | {_number(over_all)} | {_number(within)} |")
    return lines


def _pictures(
    rows: Sequence[Row], found: Sequence[Race], design: WarmStartStudy
) -> Iterator[tuple[str, Figure]]:
    """Those that there are rows for."""
    by_start = {start: [r for r in found if r.start == start] for start in WARM}
    ran = {start: own for start, own in by_start.items() if own}
    if ran:
        yield (
            "speed-ups.png",
            draw_speed_ups(
                {start: sorted(race.speed_up for race in own) for start, own in ran.items()}
            ),
        )
        if curves := _curves(ran):
            yield "curves.png", draw_mean_curves(curves)
    points = {start: own for start in SINGLE if (own := _gains(rows, start, design))}
    if points:
        dots = {
            start: [(row.distance, 100 * gain) for row, gain in own]
            for start, own in points.items()
        }
        yield "distance.png", draw_distance_effect(dots, design.reduced_epochs)
    tested = {title: _tested(rows, *both) for title, both in _compared(design).items()}
    if any(tested.values()):
        yield "retrained.png", draw_pairs({title: own for title, own in tested.items() if own})


def _curves(ran: Mapping[str, Sequence[Race]]) -> dict[str, dict[int, list[float]]]:
    """Accuracies by epoch from scratch, final ones by budget of warm searches; of common blocks."""
    common = set.intersection(*({race.scratch.block for race in own} for own in ran.values()))
    if not common:
        return {}
    first = next(iter(ran.values()))
    scratch = [race.scratch for race in first if race.scratch.block in common]
    curves = {
        SCRATCH: {e + 1: [r.accuracies[e] for r in scratch] for e in range(scratch[0].epochs)}
    }
    for start, own in ran.items():
        kept = [race for race in own if race.scratch.block in common]
        curves[start] = {
            row.epochs: [race.warm[place].final_accuracy for race in kept]
            for place, row in enumerate(kept[0].warm)
        }
    return curves


def _tested(
    rows: Sequence[Row], warm: tuple[str, int], scratch: tuple[str, int]
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
