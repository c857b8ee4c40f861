"""The pictures hold what they were given. Not pixels: lines, labels, patches, values."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

from nas.observer import EpochRecord
from nas.spaces.darts.genotype import EDGES, OPERATIONS, PUBLISHED, Gene, Genotype
from pipeline.figures import (
    NetworkAccuracies,
    draw_alphas,
    draw_cells,
    draw_comparison,
    draw_confusion,
    draw_distances,
    draw_learning_curves,
    draw_map,
    draw_search_curves,
    nearest,
)
from pipeline.figures.distances import planar_map
from pipeline.figures.style import BLUE, GREY, family_of, short_name


def make_records(epochs: int, factor: float = 1.0) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch,
            {
                "train/loss": factor * (2.0 - 0.1 * epoch),
                "val/accuracy": factor * (0.1 + 0.01 * epoch),
            },
        )
        for epoch in range(epochs)
    ]


def make_search_records(epochs: int) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch,
            {
                "supernet/train_loss": 2.0 - 0.1 * epoch,
                "supernet/val_loss": 2.1 - 0.1 * epoch,
                "supernet/train_accuracy": 0.1 + 0.02 * epoch,
                "supernet/val_accuracy": 0.1 + 0.01 * epoch,
                "alpha/entropy_normal": 2.07 - 0.05 * epoch,
                "alpha/entropy_reduce": 2.07 - 0.03 * epoch,
                "skip/normal": float(epoch // 2),
                "skip/reduce": 1.0,
                # discretised networks are evaluated every second epoch only
                **({"supernet/discretised_accuracy": 0.05 * epoch} if epoch % 2 == 0 else {}),
            },
        )
        for epoch in range(epochs)
    ]


def random_genotype(seed: int) -> Genotype:
    rng = np.random.default_rng(seed)

    def cell() -> tuple[Gene, ...]:
        return tuple(
            Gene(str(rng.choice(OPERATIONS[1:])), int(source))
            for node in range(2, 6)
            for source in sorted(rng.choice(node, size=2, replace=False))
        )

    return Genotype(cell(), cell())


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    """[points, 2] of each labelled line."""
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.get_lines()}


def operation_labels(axes: Axes) -> list[Text]:
    return [text for text in axes.texts if text.get_gid() == "operation"]


def legend_labels(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def arcs_of(axes: Axes) -> list[FancyArrowPatch]:
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


@pytest.mark.parametrize(
    ("operation", "short"),
    [
        ("sep_conv_3x3", "sep 3×3"),
        ("max_pool_3x3", "max 3×3"),
        ("dil_conv_5x5", "dil 5×5"),
        ("skip_connect", "skip"),
        ("none", "none"),
    ],
)
def test_short_names(operation: str, short: str) -> None:
    assert short_name(operation) == short


def test_cells_draw_each_gene() -> None:
    genotype = PUBLISHED["DARTS_V2"]
    figure = draw_cells(genotype)
    for axes, genes in zip(figure.axes, (genotype.normal, genotype.reduce), strict=True):
        drawn = [text.get_text() for text in operation_labels(axes)]
        assert drawn == [short_name(gene.operation) for gene in genes]
        arcs = arcs_of(axes)
        assert len(arcs) == 8
        for position, (arc, gene) in enumerate(zip(arcs, genes, strict=True)):
            path = arc._path_original  # type: ignore[attr-defined]
            assert round(path.vertices[0][0]) == gene.source
            assert round(path.vertices[-1][0]) == 2 + position // 2
            assert to_hex(arc.get_edgecolor()).upper() == family_of(gene.operation).colour
        names = [text.get_text() for text in axes.texts]
        for state in ("$c_{k-2}$", "$c_{k-1}$", "0", "1", "2", "3", "$c_k$"):
            assert names.count(state) == 1
    assert set(legend_labels(figure)) == {
        "separable convolution",
        "dilated convolution",
        "pooling",
        "skip connection",
    }


def test_cells_have_no_overlapping_labels() -> None:
    """Over random genotypes and the densest choice of edges, at the size of a small screen."""
    genotypes = [random_genotype(seed) for seed in range(6)] + list(PUBLISHED.values())
    for genotype in genotypes:
        figure = draw_cells(genotype)
        figure.set_dpi(80)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            texts = [text for text in axes.texts if text.get_text()]
            boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
            for (a, first), (b, second) in combinations(zip(texts, boxes, strict=True), 2):
                assert not first.overlaps(second), (a.get_text(), b.get_text(), genotype)
            for box in boxes:
                assert box.x0 >= 0
                assert box.x1 <= 800


def test_alphas_show_mean_and_range() -> None:
    rng = np.random.default_rng(0)
    history = rng.dirichlet(np.ones(8), size=(5, 2, len(EDGES)))  # [epochs, cells, edges, ops]
    figure = draw_alphas(history, OPERATIONS)
    for cell, axes in enumerate(figure.axes):
        lines = lines_of(axes)
        assert list(lines) == [short_name(operation) for operation in OPERATIONS]
        for index, line in enumerate(lines.values()):
            assert line[:, 0].tolist() == [0, 1, 2, 3, 4]
            np.testing.assert_allclose(line[:, 1], history[:, cell, :, index].mean(axis=1))
        assert len(axes.collections) == 8
        band = axes.collections[3].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(history[:, cell, :, 3].max())
        assert band[:, 1].min() == pytest.approx(history[:, cell, :, 3].min())
    assert legend_labels(figure) == [short_name(operation) for operation in OPERATIONS]


def test_alphas_tell_operations_apart() -> None:
    figure = draw_alphas(np.full((2, 2, 14, 8), 1 / 8), OPERATIONS)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == len(OPERATIONS)


def test_search_curves_show_each_metric() -> None:
    loss, accuracy, entropy, skips = (
        lines_of(axes) for axes in draw_search_curves(make_search_records(6)).axes
    )
    assert list(loss) == ["train", "validation"]
    np.testing.assert_allclose(loss["validation"][:, 1], [2.1, 2.0, 1.9, 1.8, 1.7, 1.6])
    np.testing.assert_allclose(accuracy["train"][:, 1], [10, 12, 14, 16, 18, 20])
    np.testing.assert_allclose(accuracy["discretised"], [[0, 0], [2, 10], [4, 20]])
    np.testing.assert_allclose(entropy["reduction cell"][-1], [5, 1.92])
    assert skips["normal cell"][:, 1].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("records", [[], make_search_records(1), [EpochRecord(0, {"lr": 0.1})]])
def test_search_curves_of_little_are_drawn(records: list[EpochRecord]) -> None:
    figure = draw_search_curves(records)
    figure.savefig(io.BytesIO(), format="png")
    if len(records) == 1 and "supernet/train_loss" in records[0].metrics:
        # a line of one point shows only by its marker
        assert all(line.get_marker() == "o" for axes in figure.axes for line in axes.get_lines())


def test_learning_curves_put_random_networks_in_grey() -> None:
    figure = draw_learning_curves(
        {
            "transferred, seed 0": make_records(4),
            "random 0": make_records(4, 0.5),
            "random 1": make_records(4, 0.6),
        }
    )
    for axes in figure.axes:
        colours = [line.get_color() for line in axes.get_lines()]
        assert colours == [GREY, GREY, BLUE]  # the transferred network last: on top
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["random", "transferred"]
    top = figure.axes[1].get_lines()[2]
    np.testing.assert_allclose(top.get_ydata(), [10, 11, 12, 13])


def test_confusion_shares_each_row() -> None:
    figure = draw_confusion([[3, 1, 0], [0, 0, 0], [5, 0, 15]], ["cat", "cow", "dog"])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "18 of 24 images correct (75.0%)"
    np.testing.assert_allclose(
        axes.get_images()[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]
    )
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "75", (1, 0): "25", (0, 2): "25", (2, 2): "75"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "cow", "dog"]
    assert axes.get_ylabel() == "true class"


@pytest.mark.parametrize(("classes", "numbered"), [(20, True), (21, False)])
def test_confusion_of_many_classes_has_no_numbers(classes: int, numbered: bool) -> None:
    figure = draw_confusion(np.eye(classes), [str(index) for index in range(classes)])
    assert bool(figure.axes[0].texts) is numbered


def test_comparison_shows_seeds_means_and_intervals() -> None:
    figure = draw_comparison(
        [
            NetworkAccuracies("cell transfer", "transferred", (0.80, 0.82, 0.84)),
            NetworkAccuracies("random sampling", "random", (0.70,)),
        ],
        linear_accuracy=0.55,
    )
    (axes,) = figure.axes
    dots = [collection.get_offsets()[:, 0].tolist() for collection in axes.collections]
    assert dots == [pytest.approx([80, 82, 84]), pytest.approx([70])]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["cell transfer", "random sampling"]
    # one training has a mean and no interval: interval, mean, mean, linear model
    interval, first, second, linear = [np.asarray(line.get_xdata()) for line in axes.get_lines()]
    half = 4.303 * 2 / np.sqrt(3)  # t(0.975, 2) of the tables, standard deviation 2
    np.testing.assert_allclose(interval, [82 - half, 82 + half], rtol=1e-4)
    assert (first[0], second[0]) == (pytest.approx(82), pytest.approx(70))
    np.testing.assert_allclose(linear, 55)
    assert legend_labels(figure) == ["transferred", "random", "linear model (55.0%)"]
    assert axes.yaxis_inverted()  # the first row on top


def test_figures_are_in_no_global_list() -> None:
    from matplotlib import pyplot

    draw_search_curves(make_records(2))
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_cells(PUBLISHED["PDARTS"]),
        lambda: draw_learning_curves({"transferred": make_records(3)}),
        lambda: draw_confusion(np.eye(3), ["a", "b", "c"]),
        lambda: draw_comparison([NetworkAccuracies("a network", "transferred", (0.5, 0.6))]),
    ],
    ids=["cells", "learning", "confusion", "comparison"],
)
def test_figures_save_without_complaint(
    draw: Callable[[], Figure], recwarn: pytest.WarningsRecorder
) -> None:
    """Constrained layout warns when it has no room for what it should place."""
    file = io.BytesIO()
    draw().savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert not recwarn.list


class TestDistances:
    PLACES = np.array([[0, 0], [3, 0], [0, 4], [10, 1.0]])
    MATRIX = np.linalg.norm(PLACES[:, None] - PLACES[None], axis=-1)
    NAMES = ("a", "b", "c", "d")

    def test_nearest_is_another(self) -> None:
        assert nearest(self.MATRIX) == [1, 0, 0, 1]

    def test_heat_map_has_the_values_and_frames_the_nearest(self) -> None:
        axes = draw_distances(self.MATRIX, self.NAMES).axes[0]
        others = ~np.eye(4, dtype=bool)
        np.testing.assert_array_equal(axes.images[0].get_array()[others], self.MATRIX[others])
        texts = [text.get_text() for text in axes.texts]
        assert texts == [f"{value:.4g}" for value in self.MATRIX[others]]
        frames = [(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in axes.patches]
        assert frames == [(0, 1), (1, 0), (2, 0), (3, 1)]

    def test_map_keeps_the_distances_of_a_plane(self) -> None:
        places, share = planar_map(self.MATRIX)
        assert share == pytest.approx(1)
        again = np.linalg.norm(places[:, None] - places[None], axis=-1)
        np.testing.assert_allclose(again, self.MATRIX, atol=1e-9)
        axes = draw_map(self.MATRIX, self.NAMES).axes[0]
        assert [text.get_text() for text in axes.texts] == list(self.NAMES)
        assert "100% of the squared distances" in axes.get_title(loc="left")

    def test_map_of_more_than_a_plane_says_so(self) -> None:
        """Four sets at equal distances are a tetrahedron: a plane has two of its three axes."""
        _, share = planar_map(1 - np.eye(4))
        assert share == pytest.approx(2 / 3)

    @pytest.mark.parametrize("count", [2, 30])
    def test_few_and_many_sets(self, count: int) -> None:
        rng = np.random.default_rng(0)
        upper = np.triu(rng.random((count, count)), 1)
        names = [f"set {k}" for k in range(count)]
        for figure in (draw_distances(upper + upper.T, names), draw_map(upper + upper.T, names)):
            FigureCanvasAgg(figure).draw()
