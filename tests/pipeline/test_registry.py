from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import pytest
import torch
from torch import nn
from workplace import Workplace

from nas.data import load_task
from nas.errors import ConfigurationError, TrackingError
from pipeline.lineage import lineage
from pipeline.registry import Registered, find_version, register, resolve
from pipeline.tracking import RunLog, Tracker

BATCHES = (1, 2, 7, 64)


class SmallNetwork(nn.Module):
    """Strided, normalised and with a training-only head, as the project's networks are."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, classes)
        self.auxiliary_head: nn.Module | None = nn.Linear(8, 10_000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.first(images)))
        return self.last(features.mean(dim=(2, 3)))


def make_network(channels: int, classes: int) -> SmallNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNetwork(channels, classes)
        network(torch.randn(64, channels, 8, 8) * 3 + 1)  # moves the running statistics
    return network.train()


def make_task(channels: int = 3, classes: tuple[str, ...] = ("ape", "bee", "cat")) -> Any:
    return SimpleNamespace(
        name="animals",
        description="Animals drawn for this test.",
        digest="0123456789abcdef" * 4,
        classes=classes,
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        shape=SimpleNamespace(channels=channels, height=9, width=8, classes=len(classes)),
        splits=SimpleNamespace(train=torch.arange(5), val=torch.arange(2), test=torch.arange(3)),
    )


def draw_images(count: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, 9, 8, channels), dtype=np.uint8)


def expected(network: nn.Module, task: Any, images: np.ndarray) -> np.ndarray:
    """The probabilities by numpy's normalisation and the eager network."""
    pixels = (images.astype(np.float64) / 255 - task.mean) / task.std
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def add(log: RunLog, accuracy: float, said: list[str] | None = None, **options: Any) -> Registered:
    task = options.pop("task", None) or make_task()
    channels = task.shape.channels
    network = options.pop("network", None) or make_network(channels, len(task.classes))
    return register(
        log,
        options.pop("name", "animals-net"),
        network,
        task,
        sample=options.pop("sample", draw_images(4, channels)),
        description="A small network.",
        tags={"genotype_digest": "abc", "macs": 1234, "params": 56},
        validation_accuracy=accuracy,
        say=(said if said is not None else []).append,
    )


@pytest.fixture
def log(tracker: Tracker) -> Any:
    with tracker.open_run("transfer") as log:
        yield log


class TestRegister:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_raw_images_in_probabilities_out_at_any_batch_size(
        self, log: RunLog, channels: int
    ) -> None:
        task, network = make_task(channels), make_network(channels, 3)
        registered = add(log, 0.5, task=task, network=network)
        assert network.training
        assert network.auxiliary_head is not None
        by_function = mlflow.pyfunc.load_model("models:/animals-net@champion")
        by_torch = mlflow.pytorch.load_model(registered.uri)
        for count in BATCHES:
            images = draw_images(count, channels)
            probabilities = by_function.predict(images)
            assert probabilities.dtype == np.float32
            truth = expected(network, task, images)
            np.testing.assert_allclose(probabilities, truth, atol=1e-6)
            with torch.no_grad():
                again = by_torch(torch.from_numpy(images)).numpy()
            np.testing.assert_allclose(again, truth, atol=1e-6)
        assert log.tracker.run(log.run_id).status == "RUNNING"  # type: ignore[union-attr]

    def test_raw_images_of_another_size_are_scaled_inside_the_model(self, log: RunLog) -> None:
        task = load_task("animals", root=Path("nowhere"), limit=300, image_size=14)
        network = make_network(1, 10)
        raw = task.examples.permute(0, 2, 3, 1).contiguous().numpy()
        assert raw.shape[1:] == (28, 28, 1)
        registered = add(log, 0.5, task=task, network=network, sample=raw)
        scaled = task.images.gather(task.splits.val[: len(raw)]).permute(0, 2, 3, 1).numpy()
        probabilities = mlflow.pyfunc.load_model(registered.uri).predict(raw)
        np.testing.assert_allclose(probabilities, expected(network, task, scaled), atol=1e-6)

    def test_the_version_says_what_it_is(self, log: RunLog) -> None:
        log.set_tags({"lineage.search_run": "1234", "method": "darts"})
        registered = add(log, 0.75)
        client = log.tracker.client
        version = client.get_model_version("animals-net", registered.version)
        assert version.description == "A small network."
        assert version.run_id == log.run_id
        assert version.source == f"models:/{registered.model_id}"
        assert json.loads(version.tags["classes"]) == ["ape", "bee", "cat"]
        assert float(version.tags["validation_accuracy"]) == 0.75
        wanted = {
            "genotype_digest": "abc",
            "macs": "1234",
            "params": "56",
            "dataset": "animals",
            "dataset_digest": "0123456789abcdef" * 4,
            "lineage.search_run": "1234",
        }
        assert wanted.items() <= version.tags.items()
        assert "method" not in version.tags
        model = client.get_logged_model(registered.model_id)
        assert model.experiment_id == log.tracker.experiment_id
        assert model.status == "READY"
        outputs = client.get_run(log.run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [registered.model_id]

    def test_what_is_stored(self, log: RunLog) -> None:
        registered = add(log, 0.5)
        folder = Path(mlflow.artifacts.download_artifacts(registered.uri))
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert "model.pt2" in names
        assert not [name for name in names if name.endswith((".pkl", ".pth", ".py"))]
        # The training-only head alone has 90,000 numbers.
        assert (folder / "data" / "model.pt2").stat().st_size < 100_000
        requirements = (folder / "requirements.txt").read_text().split()
        assert [line.split("==")[0] for line in requirements] == ["torch", "mlflow", "numpy"]
        assert "+" not in "".join(requirements)
        info = mlflow.models.get_model_info(registered.uri)
        assert info.metadata == {"classes": ["ape", "bee", "cat"]}
        assert info.signature.inputs.inputs[0].shape == (-1, 9, 8, 3)
        assert info.signature.outputs.inputs[0].shape == (-1, 3)

    def test_a_machine_with_a_gpu_can_load_it(
        self, log: RunLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registered = add(log, 0.5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        model = mlflow.pyfunc.load_model(registered.uri)
        assert model.predict(draw_images(2)).shape == (2, 3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sample": draw_images(1)}, "two or more sample images"),
            ({"sample": draw_images(2).astype(np.float32)}, "uint8 .* not float32"),
            ({"accuracy": float("nan")}, "within 0 and 1"),
            ({"accuracy": 75.0}, "within 0 and 1, 75.0 does not"),
        ],
    )
    def test_what_cannot_be_registered(
        self, log: RunLog, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            add(log, **{"accuracy": 0.5, **options})

    def test_a_name_that_mlflow_refuses(self, log: RunLog) -> None:
        with pytest.raises(TrackingError, match=r"'folder:/pets'.*Names cannot contain"):
            add(log, 0.5, name="folder:/pets")


class TestAlias:
    def test_the_champion_changes_only_when_it_is_beaten(self, log: RunLog) -> None:
        aliases = [add(log, accuracy).alias for accuracy in (0.5, 0.5, 0.4, 0.6)]
        assert aliases == ["champion", "challenger", "challenger", "champion"]
        stored = log.tracker.client.get_registered_model("animals-net").aliases
        assert {alias: int(version) for alias, version in stored.items()} == {
            "champion": 4,
            "challenger": 3,
        }

    def test_a_champion_without_accuracy_stays(self, log: RunLog) -> None:
        add(log, 0.5)
        log.tracker.client.delete_model_version_tag("animals-net", "1", "validation_accuracy")
        said: list[str] = []
        assert add(log, 0.9, said).alias == "challenger"
        assert said[0].startswith("version 1 of animals-net stays champion")


class TestResolve:
    def test_by_alias_version_and_name(self, log: RunLog) -> None:
        task, network = make_task(), make_network(3, 3)
        add(log, 0.5, task=task, network=network)
        for uri in ("models:/animals-net@champion", "models:/animals-net/1", "animals-net"):
            found = resolve(log.tracker, uri)
            assert (found.name, found.version) == ("animals-net", "1")
        assert found.classes == task.classes
        assert found.shape == (9, 8, 3)
        assert found.aliases == ("champion",)
        assert found.run_id == log.run_id
        assert found.tags["macs"] == "1234"
        images = draw_images(300)  # more than one batch
        truth = expected(network, task, images)
        np.testing.assert_allclose(found.predict(images), truth, atol=1e-6)
        with pytest.raises(ConfigurationError, match="not uint8 of shape"):
            found.predict(images[:, :5])

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("models:/animal-net@champion", "did you mean 'animals-net'"),
            ("models:/animals-net@champoin", "no alias 'champoin': it has @champion"),
            ("models:/animals-net/7", "7.* not found"),
            ("runs:/abc/model", "write models:/NAME@champion"),
        ],
    )
    def test_what_is_not_there(self, log: RunLog, uri: str, message: str) -> None:
        client = log.tracker.client
        client.create_registered_model("animals-net")
        model = client.create_logged_model(log.tracker.experiment_id)
        version = client.create_model_version("animals-net", f"models:/{model.model_id}")
        client.set_registered_model_alias("animals-net", "champion", version.version)
        with pytest.raises(TrackingError, match=message):
            find_version(log.tracker, uri)

    def test_an_empty_registry(self, tracker: Tracker) -> None:
        with pytest.raises(TrackingError, match="no model 'pets' is registered: there are none"):
            resolve(tracker, "pets")


class TestLineage:
    def test_it_leads_back_to_every_run_and_data_set(self, tracker: Tracker) -> None:
        source, target = make_task(), make_task()
        source.name, source.digest = "digits", "f" * 64
        with tracker.open_run("an earlier transfer") as earlier:
            with tracker.open_run("search", parent=earlier, tags={"step": "search"}) as search:
                search.log_dataset(source, "source")
            with tracker.open_run("unrelated", parent=earlier):
                pass
        with tracker.open_run("transfer") as job:
            job.set_tags({"reused.search": search.run_id})
            job.set_tags({"lineage.training_run": "0" * 32})  # a run that was deleted since
            job.log_dataset(target, "target")
            with tracker.open_run("retrain", parent=job) as retrain:
                retrain.log_dataset(target, "target")
            registered = add(job, 0.5)
        found = lineage(tracker, "models:/animals-net@champion")
        assert (found.version, found.model_id) == ("1", registered.model_id)
        assert found.run.run_id == found.job.run_id == job.run_id
        assert {run.run_id for run in found.steps} == {retrain.run_id, search.run_id}
        assert {(data.name, data.digest, data.context) for data in found.datasets} == {
            ("digits", "f" * 64, "source"),
            ("animals", target.digest, "target"),
        }
        assert found.tags["genotype_digest"] == "abc"


ELSEWHERE = """
import importlib.util, sys
for name in ("nas", "pipeline"):
    assert importlib.util.find_spec(name) is None, name
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model("models:/animals-net@champion")
images = numpy.load(sys.argv[1])
numpy.savez(sys.argv[2], **{str(n): model.predict(images[:n]) for n in map(int, sys.argv[3:])})
print(model.metadata.metadata["classes"])
"""


def test_whoever_has_mlflow_and_torch_but_not_this_project_can_use_it(
    log: RunLog, workplace: Workplace, tmp_path: Path
) -> None:
    task, network = make_task(), make_network(3, 3)
    add(log, 0.5, task=task, network=network)
    python = _environment_without_this_project(tmp_path / "environment")
    images, answers = draw_images(64), tmp_path / "answers.npz"
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "empty").mkdir()
    variables = {"PATH": os.defpath, "HOME": str(tmp_path), **workplace.variables}
    done = subprocess.run(
        [python, "-c", ELSEWHERE, tmp_path / "images.npy", answers, *map(str, BATCHES)],
        cwd=tmp_path / "empty",
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['ape', 'bee', 'cat']"
    truth = expected(network, task, images)
    with np.load(answers) as stored:
        for count in BATCHES:
            np.testing.assert_allclose(stored[str(count)], truth[:count], atol=1e-6)


def _environment_without_this_project(folder: Path) -> Path:
    """A Python with every installed package but this project's, however that was installed."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("nas", "pipeline", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    paths = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    (Path(paths.stdout.strip()) / "packages.pth").write_text(str(packages))
    return python


def test_this_environment_does_have_the_project() -> None:
    """Or else the test above would prove nothing."""
    code = "import nas, pipeline"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
