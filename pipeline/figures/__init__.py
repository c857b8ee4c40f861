"""Every picture of the project.

Each function draws one figure 10 inches wide that stays readable at 800 pixels. The figures
belong to no window and no global list of figures: they are freed like any other value.
"""

from __future__ import annotations

from pipeline.figures.cells import draw_cells
from pipeline.figures.curves import draw_alphas, draw_learning_curves, draw_search_curves
from pipeline.figures.distances import draw_distances, draw_map, nearest
from pipeline.figures.results import NetworkAccuracies, draw_comparison, draw_confusion
from pipeline.figures.study import (
    draw_distance_effect,
    draw_mean_curves,
    draw_pairs,
    draw_speed_ups,
)

__all__ = [
    "NetworkAccuracies",
    "draw_alphas",
    "draw_cells",
    "draw_comparison",
    "draw_confusion",
    "draw_distance_effect",
    "draw_distances",
    "draw_learning_curves",
    "draw_map",
    "draw_mean_curves",
    "draw_pairs",
    "draw_search_curves",
    "draw_speed_ups",
    "nearest",
]
