"""A data set as MLflow shows it: an input of a run, with digest, schema and profile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import Dataset, DatasetInput, InputTag, Run
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

if TYPE_CHECKING:
    from nas.data.task import ImageTask

DIGEST_LENGTH, NAME_LENGTH, TAG_LENGTH = 36, 500, 500  # MLflow's limits


@dataclass(frozen=True)
class DatasetSummary:
    """A data set that a run had as input; ``context`` is its role, ``digest`` the whole digest."""

    name: str
    digest: str
    context: str


def dataset_input(task: ImageTask, context: str) -> DatasetInput:
    """``task`` as an input in the role ``context``, as "source" or "target".

    MLflow keeps 36 digits of the digest; the input's tag ``digest`` has them all.
    """
    height_width_channels = (task.shape.height, task.shape.width, task.shape.channels)
    schema = TensorDatasetSchema(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *height_width_channels), "images")]),
        Schema([TensorSpec(np.dtype(np.int64), (-1,), "labels")]),
    )
    counts = {name: len(getattr(task.splits, name)) for name in ("train", "val", "test")}
    profile = {
        "num_rows": sum(counts.values()),
        **counts,
        "height_width_channels": height_width_channels,
        "classes": list(task.classes),
    }
    dataset = Dataset(
        name=task.name[:NAME_LENGTH],
        digest=task.digest[:DIGEST_LENGTH],
        source_type="code",
        source=json.dumps({"tags": {"name": task.name, "description": task.description}}),
        schema=json.dumps(schema.to_dict()),
        profile=json.dumps(profile),
    )
    tags = [
        InputTag(MLFLOW_DATASET_CONTEXT, context),
        InputTag("digest", task.digest[:TAG_LENGTH]),
    ]
    return DatasetInput(dataset, tags)


def datasets_of(run: Run) -> tuple[DatasetSummary, ...]:
    """The data-set inputs of ``run``."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    summaries = []
    for entry in inputs:
        tags = {tag.key: tag.value for tag in entry.tags}
        digest = tags.get("digest", entry.dataset.digest)
        context = tags.get(MLFLOW_DATASET_CONTEXT, "")
        summaries.append(DatasetSummary(entry.dataset.name, digest, context))
    return tuple(summaries)
