"""Registered networks as others use them: raw images of any size in, probabilities out."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import SmallNetwork, add, draw_images, expected, make_network, make_task
from striped_images import write_stripes
from torch import nn
from workplace import Workplace

from nas.data import ImageTask, load_task
from nas.data.scaling import scale_to_cover
from pipeline.registry import resolve
from pipeline.serving import serve
from pipeline.tracking import RunLog

BATCHES = (1, 2, 7, 64)


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_images_in_probabilities_out_at_any_batch_size(log: RunLog, channels: int) -> None:
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


def trained(task: ImageTask) -> SmallNetwork:
    """A network that knows the training split of ``task``."""
    network = make_network(task.shape.channels, len(task.classes))
    network.last = nn.Linear(8, len(task.classes))
    optimiser = torch.optim.Adam(network.parameters(), 0.03)
    train = task.splits.train
    pixels = task.images.gather(train).float() / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (task.mean, task.std))
    normalised = (pixels - mean) / std
    for _ in range(100):
        loss = F.cross_entropy(network(normalised), task.labels[train])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@pytest.mark.parametrize("size", [None, 24])
def test_raw_files_of_mixed_sizes_are_predicted_as_in_the_test_split(
    log: RunLog, tmp_path: Path, size: int | None
) -> None:
    folder = write_stripes(tmp_path / "stripes")
    task = load_task(f"folder:{folder}", root=tmp_path, image_size=size)
    network = trained(task)
    sample = task.examples.permute(0, 2, 3, 1).contiguous().numpy()
    add(log, 0.5, task=task, network=network, sample=sample)
    test = task.splits.test
    raw = [image.permute(1, 2, 0).numpy() for image in task.images.originals(test)]
    assert len({image.shape for image in raw}) > 10
    predicted = resolve(log.tracker, "animals-net").predict(raw)
    scaled = task.images.gather(test).permute(0, 2, 3, 1).numpy()
    truth = expected(network, task, scaled)
    labels = task.labels[test].numpy()
    assert (truth.argmax(axis=1) == labels).mean() > 0.8
    np.testing.assert_array_equal(predicted.argmax(axis=1), truth.argmax(axis=1))
    # the reader's pixels are Pillow's, which are off by one level now and then
    np.testing.assert_allclose(predicted, truth, atol=0.005)
    assert not np.allclose(predicted, truth, atol=1e-7)  # it was scaled by other means


def test_raw_images_of_a_named_set_are_scaled_as_by_its_reader(log: RunLog) -> None:
    task = load_task("animals", root=Path("nowhere"), limit=300, image_size=14)
    network = make_network(1, 10)
    raw = task.examples.permute(0, 2, 3, 1).contiguous().numpy()
    assert raw.shape[1:] == (28, 28, 1)
    registered = add(log, 0.5, task=task, network=network, sample=raw)
    scaled = task.images.gather(task.splits.val[: len(raw)]).permute(0, 2, 3, 1).numpy()
    probabilities = mlflow.pyfunc.load_model(registered.uri).predict(raw)
    np.testing.assert_allclose(probabilities, expected(network, task, scaled), atol=1e-6)


def test_images_of_the_networks_size_are_not_touched() -> None:
    task, network = make_task(), make_network(3, 3)
    images = torch.from_numpy(draw_images(5))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (task.mean, task.std))
    with torch.no_grad():
        plain = torch.softmax(network.eval()((pixels - mean) / std), dim=1)
        assert torch.equal(serve(network, task)(images), plain)


def test_what_is_stored(log: RunLog) -> None:
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
    assert info.signature.inputs.inputs[0].shape == (-1, -1, -1, 3)
    assert info.signature.outputs.inputs[0].shape == (-1, 3)


@pytest.mark.parametrize("size", [(9, 8), (50, 31), (1, 6)])
def test_the_input_example_is_the_sample(log: RunLog, size: tuple[int, int]) -> None:
    sample = draw_images(1, size=size)
    model = mlflow.pyfunc.load_model(add(log, 0.5, sample=sample).uri)
    np.testing.assert_array_equal(model.input_example, sample)
    assert model.predict(model.input_example).shape == (1, 3)
    assert model.predict(draw_images(5, size=(40, 30))).shape == (5, 3)


def test_a_machine_with_a_gpu_can_load_it(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = add(log, 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = mlflow.pyfunc.load_model(registered.uri)
    assert model.predict(draw_images(2)).shape == (2, 3)


ELSEWHERE = """
import importlib.util, sys
for name in ("nas", "pipeline"):
    assert importlib.util.find_spec(name) is None, name
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model("models:/animals-net@champion")
with numpy.load(sys.argv[1]) as images:
    numpy.savez(sys.argv[2], **{name: model.predict(images[name]) for name in images})
print(model.metadata.metadata["classes"])
"""


def test_whoever_has_mlflow_and_torch_but_not_this_project_can_use_it(
    log: RunLog, workplace: Workplace, tmp_path: Path
) -> None:
    task, network = make_task(), make_network(3, 3)
    add(log, 0.5, task=task, network=network)
    python = _environment_without_this_project(tmp_path / "environment")
    images = {
        str(number): draw_images(count, size=size)
        for number, (count, size) in enumerate(
            [*((count, (9, 8)) for count in BATCHES), (1, (1, 1)), (3, (1, 30)), (5, (70, 50))]
        )
    }
    answers = tmp_path / "answers.npz"
    np.savez(tmp_path / "images.npz", **images)
    (tmp_path / "empty").mkdir()
    variables = {"PATH": os.defpath, "HOME": str(tmp_path), **workplace.variables}
    done = subprocess.run(
        [python, "-c", ELSEWHERE, tmp_path / "images.npz", answers],
        cwd=tmp_path / "empty",
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['ape', 'bee', 'cat']"
    with np.load(answers) as stored:
        assert len(images) == len(stored.files)
        for name, raw in images.items():
            pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).float()
            scaled = scale_to_cover(pixels, 9, 8).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(stored[name], expected(network, task, scaled), atol=1e-6)


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
