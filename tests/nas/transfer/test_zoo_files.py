"""Entries of the zoo on disk: what comes back, and files that nobody should trust."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from zoo_entries import make_entry

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import ImageTask, load_task
from nas.errors import CheckpointError
from nas.transfer.zoo import (
    Card,
    SourceCard,
    ZooEntry,
    file_digest,
    image_hashes,
    joint_hashes,
    load_entry,
    overlap,
    save_entry,
)


@pytest.fixture
def entry(few_digits: ImageTask) -> ZooEntry:
    return make_entry(few_digits)


@pytest.fixture
def path(entry: ZooEntry, tmp_path: Path) -> Path:
    save_entry(tmp_path / "entry.safetensors", entry)
    return tmp_path / "entry.safetensors"


def test_what_was_saved_comes_back(entry: ZooEntry, path: Path) -> None:
    loaded = load_entry(path, file_digest(path))
    assert loaded.card == entry.card
    assert torch.equal(loaded.hashes, entry.hashes)
    assert loaded.supernet.signature() == entry.supernet.signature()
    for name, tensor in entry.supernet.state_dict().items():
        assert torch.equal(loaded.supernet.state_dict()[name], tensor), name


def test_the_card_is_json_and_back(entry: ZooEntry) -> None:
    assert Card.from_json(json.loads(json.dumps(asdict(entry.card)))) == entry.card


def test_the_card_of_a_source(few_digits: ImageTask) -> None:
    assert SourceCard.of(few_digits) == SourceCard(
        "digits", few_digits.digest, 200, 10, 1, 8, 8, few_digits.mean, few_digits.std
    )


def test_the_scale_of_several_sources() -> None:
    """The mean of a grey set, repeated, and a coloured one."""
    grey = SourceCard("a", "1", 9, 2, 1, 8, 8, (0.5,), (0.25,))
    colour = SourceCard("b", "2", 9, 2, 3, 8, 8, (0.1, 0.2, 0.3), (0.75, 0.25, 0.25))
    card = Card("darts", 0, (grey, colour), (0.5,), 1.0)
    mean, std = card.scale
    assert mean == pytest.approx((0.3, 0.35, 0.4))
    assert std == pytest.approx((0.5, 0.25, 0.25))


class TestOverlap:
    def test_of_a_set_with_itself_and_with_another(
        self, few_digits: ImageTask, animals: ImageTask
    ) -> None:
        digits, others = image_hashes(few_digits), image_hashes(animals)
        assert overlap(digits, digits) == 1
        assert overlap(digits, others) == 0
        both = image_hashes(few_digits, animals)
        assert overlap(digits, both) == 1
        assert torch.equal(joint_hashes(digits, others, digits), both)

    def test_at_another_size(self, tmp_path: Path) -> None:
        """Images are recognised as they came, whatever size they are used at."""
        small, large = (
            load_task("mnist5k", root=tmp_path, limit=100, image_size=size) for size in (8, 20)
        )
        assert overlap(image_hashes(small), image_hashes(large)) == 1

    def test_a_share(self) -> None:
        target, source = torch.arange(10), torch.tensor([-4, 2, 5, 7, 400])
        assert overlap(target, source) == pytest.approx(0.3)

    def test_hashes_are_those_of_the_contents(self, few_digits: ImageTask) -> None:
        """64 bits of each SHA-256, sorted and without repeats."""
        hashes = image_hashes(few_digits)
        assert (hashes[1:] > hashes[:-1]).all()
        expected = {
            int.from_bytes(origin[:8], "little", signed=True)
            for origin in few_digits.images.origins()
        }
        assert set(hashes.tolist()) == expected


def edited(path: Path, change: Callable[[dict, dict], object]) -> Path:
    """The same file with something changed, and digests that are right again."""
    checkpoint = load_checkpoint(path)
    tensors, values = dict(checkpoint.tensors), json.loads(json.dumps(dict(checkpoint.values)))
    change(tensors, values)
    save_checkpoint(path, Checkpoint(tensors, values))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("alphas"), "lacks the tensor 'alphas'"),
        (lambda t, v: t.pop("weights.stem.filters"), r"lacks the tensor 'weights\.stem\.filters'"),
        (lambda t, v: t.update({"weights.stem.scale": torch.ones(5)}), r"\(5,\), but \(12,\)"),
        (lambda t, v: t.update(alphas=t["alphas"].double()), "type torch.float64, but torch.f"),
        (lambda t, v: t.update(alphas=t["alphas"] / 0), "'alphas' that are not finite"),
        (lambda t, v: t.update(betas=torch.ones(2, 14)), "tensor 'betas' that no such supernet"),
        (lambda t, v: t.update({"../../evil": torch.ones(1)}), r"'\.\./\.\./evil' that no such"),
        (lambda t, v: t.update({"weights.cells.9.a": torch.ones(1)}), "that no such supernet has"),
        (lambda t, v: t.update({"extra.more": torch.ones(1)}), "lacks the sorted hashes"),
        (lambda t, v: t.pop("extra.image_hashes"), "lacks the sorted hashes"),
        (
            lambda t, v: t.update({"extra.image_hashes": t["extra.image_hashes"].flip(0)}),
            "lacks the sorted hashes",
        ),
        (lambda t, v: v.update(space="elsewhere"), "unknown space 'elsewhere'"),
        (lambda t, v: v["config"].update(cells=10**9), "at most 1000 cells"),
        (lambda t, v: v["config"].update(channels=10**9), r"but \(3, 3, 1, 3000000000\) is wanted"),
        (lambda t, v: v["shape"].update(classes=10**12), r"but \(\d+, 10{12}\) is wanted"),
        (lambda t, v: v["shape"].pop("classes"), "describes no supernet"),
        (lambda t, v: v["about"].pop("sources"), "no readable card: 'sources'"),
        (lambda t, v: v["about"].update(sources=[]), "names no source"),
        (lambda t, v: v["about"].update(accuracies=[1.5]), "outside 0 and 1"),
        (lambda t, v: v["about"].update(accuracies=["x"]), "no readable card"),
        (lambda t, v: v["about"].update(seconds=float("inf")), "does not take inf seconds"),
        (lambda t, v: v["about"]["sources"][0].update(classes=3), "10 classes, but its sources"),
        (lambda t, v: v["about"]["sources"][0].update(images=0), "size below 1"),
        (lambda t, v: v["about"]["sources"][0].update(std=[0.0]), "impossible scale"),
        (lambda t, v: v["about"]["sources"][0].update(mean=[]), "impossible scale"),
        (lambda t, v: v.update(kind="network"), "holds no supernet"),
        (lambda t, v: v.update(about=7), "describes no supernet"),
    ],
)
def test_a_file_that_says_what_cannot_be(
    change: Callable[[dict, dict], object], message: str, path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_entry(edited(path, change))


class TestDamaged:
    @pytest.mark.parametrize("left", [0, 7, 100, -1])
    def test_truncated(self, left: int, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_entry(path)

    def test_one_bit_of_a_tensor(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="was altered"):
            load_entry(path)

    def test_another_file_than_the_one_registered(self, path: Path) -> None:
        digest = file_digest(path)
        edited(path, lambda t, v: t["alphas"].add_(1))
        load_entry(path)  # consistent in itself
        with pytest.raises(CheckpointError, match="is not the file that was registered"):
            load_entry(path, digest)

    @pytest.mark.parametrize("size", [2**27, 2**62, 2**64 - 1])
    def test_a_huge_header(self, size: int, path: Path) -> None:
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_entry(path)

    def test_deeply_nested_json(self, path: Path) -> None:
        header = {"__metadata__": {"values": "[" * 10**5, "digest": "0"}}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_entry(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load_entry(tmp_path / "nothing", "0" * 64)
