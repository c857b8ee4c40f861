"""Checkpoints: round trips, hostile files, full disks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_atomically
from nas.errors import CheckpointError
from nas.randomness import generator

VALUES = {"epoch": 3, "names": ["a", "b"], "rate": 0.1, "nothing": None, "ü": "ß"}


def sample() -> Checkpoint:
    draw = generator(0, "test")
    tensors = {
        "weights": torch.randn(4, 3, generator=draw),
        "last": torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
        "half": torch.randn(7, generator=draw).bfloat16(),
        "double": torch.randn(2, generator=draw, dtype=torch.float64),
        "steps": torch.tensor(5),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0),
        "view": torch.arange(12.0).view(3, 4).t()[1:],
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    return Checkpoint(tensors, VALUES)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, sample())
    return path


def test_round_trip_keeps_every_bit(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.values == VALUES
    wanted = sample().tensors
    assert set(loaded.tensors) == set(wanted)
    for name, tensor in wanted.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        same = torch.equal(
            found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
        assert same, name


def test_what_is_saved_is_a_copy(tmp_path: Path) -> None:
    whole = torch.arange(6.0, requires_grad=True)
    parts = {"first": whole[:3], "second": whole[3:], "whole": whole}  # share their memory
    save_checkpoint(tmp_path / "c", Checkpoint(parts, {}))
    loaded = load_checkpoint(tmp_path / "c").tensors
    assert loaded["second"].tolist() == [3, 4, 5]
    assert loaded["whole"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not loaded["whole"].requires_grad


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    assert torch.equal(load_file(saved)["weights"], sample().tensors["weights"])


# ---- hostile files ----


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_a_file_cut_off_anywhere(saved: Path) -> None:
    data = saved.read_bytes()
    draw = generator(1, "cuts")
    cuts = {0, 1, 7, 8, 9, len(data) - 1, *torch.randint(len(data), (60,), generator=draw).tolist()}
    for cut in sorted(cuts):
        saved.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_a_file_with_more_at_its_end(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 8)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


def test_any_altered_byte_is_noticed(saved: Path) -> None:
    """Each byte in turn, in the header and in the tensors; padding alone means nothing."""
    data = saved.read_bytes()
    header = int.from_bytes(data[:8], "little")
    padding = range(8 + len(data[8 : 8 + header].rstrip(b" ")), 8 + header)
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1
        saved.write_bytes(altered)
        if place in padding:
            continue
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_altered_values_are_noticed(saved: Path) -> None:
    altered = saved.read_bytes().replace(rb"\"epoch\": 3", rb"\"epoch\": 2")
    assert altered != saved.read_bytes()
    saved.write_bytes(altered)
    with pytest.raises(CheckpointError, match="altered"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"values": "{}"},
        {"digest": "0"},
        {"values": "{", "digest": "0"},
        {"values": "[]", "digest": "0"},
        {"values": "[" * 100_000, "digest": "0"},
    ],
)
def test_safetensors_of_others(header: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "c", metadata=header)
    with pytest.raises(CheckpointError, match=r"no readable checkpoint|altered"):
        load_checkpoint(tmp_path / "c")


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name, write in (("pickle", pickle.dump), ("torch", torch.save)):
        with open(tmp_path / name, "wb") as file:
            write(Bomb(), file)
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# ---- disks ----


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failing_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; what was there before"):
        save_checkpoint(saved, Checkpoint({}, {"epoch": 4}))
    assert saved.read_bytes() == before
    assert names(saved.parent) == [saved.name]


def test_a_file_that_may_not_grow_leaves_the_old_file(saved: Path) -> None:
    """The kernel really stops the write half way."""
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(saved, Checkpoint({"big": torch.zeros(100_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert names(saved.parent) == [saved.name]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "state", sample())


def test_the_old_file_is_there_until_the_new_one_is_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = saved.read_bytes(), []
    original = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((saved.read_bytes() == before, json.loads(Path(source).read_text())))
        original(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_atomically(saved, b'{"new": 1}')
    assert seen == [(True, {"new": 1})]
    assert saved.read_bytes() == b'{"new": 1}'
    assert names(saved.parent) == [saved.name]


def test_folders_are_made(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "c", b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"
