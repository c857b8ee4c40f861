from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_networks import add, draw_images, expected, make_network, make_task

from nas.errors import ConfigurationError, TrackingError
from pipeline import registry
from pipeline.lineage import lineage
from pipeline.registry import RegisteredNetwork, find_version, resolve
from pipeline.store import Store
from pipeline.tracking import RunLog, Tracker


class TestRegister:
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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sample": draw_images(0)}, "one or more sample images"),
            ({"sample": draw_images(2, dtype=np.float32)}, "uint8 .* not float32"),
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
        assert said == [
            "version 1 of animals-net stays champion, as version 2 cannot be compared with it: "
            "the tag validation_accuracy of version 1 is missing or no number; to promote version "
            "2, give it the alias in the MLflow UI or by MlflowClient()."
            "set_registered_model_alias('animals-net', 'champion', '2')"
        ]

    @pytest.mark.parametrize("accuracy", [0.1, 0.9])
    def test_accuracies_of_other_data_are_not_compared(self, log: RunLog, accuracy: float) -> None:
        add(log, 0.5)
        other = make_task()
        other.digest = "f" * 64  # of another split, limit, size or set
        said: list[str] = []
        assert add(log, accuracy, said, task=other).alias == "challenger"
        assert len(said) == 1
        assert "version 1 was measured on other data, or on another split, limit" in said[0]
        assert add(log, 0.6, said).alias == "champion"  # of the first one's data
        assert len(said) == 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing that a program does about errors catches it."""


class MortalClient:
    """A client of the store that dies after ``calls`` calls, and stays dead."""

    def __init__(self, client: Any, calls: int) -> None:
        self.client, self.left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed(name)
            self.left -= 1
            return method(*args, **options)

        return call


class TestKilled:
    """Registering, killed after any number of calls of the store, and done again."""

    @pytest.mark.parametrize(
        ("before", "alias"), [((), "champion"), ((0.4,), "champion"), ((0.6,), "challenger")]
    )
    def test_the_version_is_made_once(
        self,
        log: RunLog,
        monkeypatch: pytest.MonkeyPatch,
        before: tuple[float, ...],
        alias: str,
    ) -> None:
        monkeypatch.setattr(registry, "save_model", save_nothing)
        left_behind = set()
        for calls in range(100):
            name = f"pets-{calls}"
            for accuracy in before:
                add(log, accuracy, name=name)
            completed = self._add_and_die(log, calls, name)
            left_behind.add(len(versions_of(log, name)) - len(before))
            registered = add(log, 0.5, name=name, step="the step")
            assert versions_of(log, name) == list(range(1, len(before) + 2))
            assert (registered.version, registered.alias) == (str(len(before) + 1), alias)
            client = log.tracker.client
            aliases = client.get_registered_model(name).aliases
            assert str(aliases[alias]) == registered.version
            assert len(aliases) == (2 if alias == "challenger" else 1)
            assert registered.model_id in find_version(log.tracker, registered.uri).source
            linked = client.get_logged_model(registered.model_id).tags["mlflow.modelVersions"]
            assert json.loads(linked) == [{"name": name, "version": registered.version}]
            if completed:
                break
        assert left_behind == {0, 1}
        assert calls > 8

    def _add_and_die(self, log: RunLog, calls: int, name: str) -> bool:
        """Whether it was done before its time was over."""
        tracker = log.tracker
        client: Any = MortalClient(tracker.client, calls)
        mortal = RunLog(Tracker(Store(client, tracker.experiment_id, None)), log.run_id)
        try:
            add(mortal, 0.5, name=name, step="the step")
        except Killed:
            return False
        return True

    def test_other_steps_and_fresh_ones_make_their_own(
        self, log: RunLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "save_model", save_nothing)
        add(log, 0.5, step="one")
        said: list[str] = []
        assert add(log, 0.5, said, step="one").version == "1"
        assert said == [
            "version 1 of animals-net is there from an earlier attempt: going on with it"
        ]
        assert add(log, 0.5, step="other").version == "2"
        assert add(log, 0.5, step="one", fresh=True).version == "3"
        assert add(log, 0.5, step="one").version == "3"


def save_nothing(served: Any, path: Path, *rest: Any) -> None:
    path.mkdir()
    (path / "MLmodel").write_text("nothing")


def versions_of(log: RunLog, name: str) -> list[int]:
    found = log.tracker.client.search_model_versions(f"name = '{name}'")
    return sorted(int(version.version) for version in found)


class TestResolve:
    def test_by_alias_version_and_name(self, log: RunLog) -> None:
        task, network = make_task(), make_network(3, 3)
        add(log, 0.5, task=task, network=network)
        for uri in ("models:/animals-net@champion", "models:/animals-net/1", "animals-net"):
            found = resolve(log.tracker, uri)
            assert (found.name, found.version) == ("animals-net", "1")
        assert found.classes == task.classes
        assert found.channels == 3
        assert found.aliases == ("champion",)
        assert found.run_id == log.run_id
        assert found.tags["macs"] == "1234"
        images = draw_images(300)  # more than one batch
        truth = expected(network, task, images)
        np.testing.assert_allclose(found.predict(images), truth, atol=1e-6)

    def test_images_of_many_sizes_keep_their_order(
        self, log: RunLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(log, 0.5)
        found = resolve(log.tracker, "animals-net")
        sizes = [(9, 8), (30, 20), (9, 8), (1, 1), (30, 20), (9, 8), (30, 20)]
        images = [draw_images(n, size=size)[0] for n, size in enumerate(sizes, 1)]
        alone = np.concatenate([found.predict(image[None]) for image in images])
        assert len({row.tobytes() for row in alone}) == len(images)
        np.testing.assert_allclose(found.predict(images), alone, atol=1e-6)
        monkeypatch.setattr(registry, "PREDICTION_BYTES", 2 * images[0].size)
        np.testing.assert_allclose(found.predict(images), alone, atol=1e-6)

    @pytest.mark.parametrize(
        "images",
        [
            draw_images(2, channels=1),
            draw_images(2, dtype=np.float32),
            draw_images(2)[..., 0],
            draw_images(2)[:, :0],
            [draw_images(1)[0], draw_images(1)],
        ],
    )
    def test_what_it_cannot_predict(self, images: Any) -> None:
        network = RegisteredNetwork(
            "pets",
            "1",
            (),
            "",
            {},
            "",
            ("cat", "dog"),
            channels=3,
            model=None,  # type: ignore[arg-type]
        )
        complaint = r"'pets' takes uint8 images \[H, W, 3\] of any height .*, not \w+ of shape \("
        with pytest.raises(ConfigurationError, match=complaint):
            network.predict(images)

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

    def test_a_registry_of_many_pages(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "NAMES_A_PAGE", 50)
        for number in range(120):
            tracker.client.create_registered_model(f"pets-{number:03}")
        model = tracker.client.create_logged_model(tracker.experiment_id)
        tracker.client.create_model_version("pets-119", f"models:/{model.model_id}")
        assert find_version(tracker, "models:/pets-119/1").name == "pets-119"
        with pytest.raises(TrackingError) as failure:
            find_version(tracker, "pets-1190")
        assert str(failure.value) == (
            "no model 'pets-1190' is registered: did you mean 'pets-119'? there are pets-000, "
            "pets-001, pets-002, pets-003, pets-004, pets-005, pets-006, pets-007, pets-008, "
            "pets-009 and 110 more"
        )


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
