"""The step that makes a version in the model registry, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from nas.errors import TrackingError
from pipeline.console import say
from pipeline.job import Job
from pipeline.registry import Registered, as_it_stands
from pipeline.steps import StepRun, run_step, step_digest


def publish_step(
    job: Job,
    kind: str,
    name: str,
    inputs: Mapping[str, Any],
    body: Callable[[StepRun, str, bool], Registered],
    tags: Mapping[str, Any],
) -> Registered:
    """Run ``body``, which registers a version of ``name``, unless an equal step has done so.

    A version that a killed attempt left behind is completed, unless ``--fresh`` forbids that; one
    that was deleted since is made anew.

    Args:
        kind: of the step.
        body: given the step's run, its digest, and whether a version that was left behind must be
            ignored.

    Raises:
        TrackingError: the registry refuses, or the version vanishes at once.
    """
    digest = step_digest(kind, inputs)

    def run(fresh: bool) -> Registered | None:
        outcome = run_step(
            kind,
            f"register {name}",
            inputs,
            lambda step: asdict(body(step, digest, job.machine.fresh)),
            parent=job.log,
            fresh=fresh,
            tags=tags,
            say=say,
        )
        return as_it_stands(job.log.tracker, Registered(**outcome.results))

    registered = run(job.machine.fresh) or run(fresh=True)
    if registered is None:
        raise TrackingError(f"the new version of '{name}' vanished while it was registered")
    job.log.log_model_output(registered.model_id)
    return registered
