"""Image data sets, their splits, and batches of them."""

from nas.data.augment import Augmentation
from nas.data.batches import Batch, Batches
from nas.data.catalog import DATA_SETS, load_task
from nas.data.linear import LinearModel, fit_linear
from nas.data.splits import halves
from nas.data.task import ImageStore, ImageTask, SplitName, Splits, TaskShape, TensorImages

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "Batch",
    "Batches",
    "ImageStore",
    "ImageTask",
    "LinearModel",
    "SplitName",
    "Splits",
    "TaskShape",
    "TensorImages",
    "fit_linear",
    "halves",
    "load_task",
]
