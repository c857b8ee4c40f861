"""The MLflow UI shows what a transfer has logged: looked at in headless Chromium.

With NAS_TRANSFER_SCREENSHOTS=FOLDER the pages are kept there as pictures, for the documentation.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Finished
from jobs import EXPERIMENT, TRANSFER, arguments

from pipeline.cli import main

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="Chromium and its driver are not installed (Debian: chromium, chromium-driver)",
    ),
]
PATIENCE = 60.0  # seconds; the first page of a fresh server takes a few
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1600,1080",
)


@pytest.fixture(scope="module")
def two_transfers(finished: Finished) -> list[str]:
    """The ids of two transfers by different methods."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in finished.place.variables.items():
            patch.setenv(name, value)
        assert main(["transfer", *arguments({**TRANSFER, "method": "pcdarts", "seed": 1})]) == 0
    return [finished.job.info.run_id, finished.place.jobs()[-1].info.run_id]


@pytest.fixture(scope="module")
def server(finished: Finished) -> Iterator[str]:
    """The address of `mlflow ui` on the store of the transfers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["ui", "--backend-store-uri", finished.place.uri, "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--workers", "1"],
        cwd=finished.place.folder,
        env=finished.place.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that it can be stopped with its workers
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(address))
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Page:
    """What a person sees of the UI."""

    def __init__(self, server: str, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self._server = server

    def open(self, path: str, *expected: str) -> str:
        """Go to a page of the UI, wait for all that is ``expected``, and return its text."""
        self.driver.get("about:blank")  # a change behind the '#' alone loads nothing
        self.driver.get(f"{self._server}/#{path}")
        wait_for(lambda: all(text in self.text for text in expected), lambda: self.text)
        self._close_assistant()
        return self.text

    @property
    def text(self) -> str:
        text = self.driver.execute_script("return document.body.innerText")
        return str(text).replace("\xa0", " ")

    def click(self, text: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.XPATH, f"//*[text()='{text}']").click()

    def widths_of_pictures(self) -> list[int]:
        script = "return [...document.images].map(i => i.naturalWidth)"
        return list(self.driver.execute_script(script))

    def keep(self, name: str) -> None:
        """Save a picture of the page where the environment asks for it."""
        if folder := os.environ.get("NAS_TRANSFER_SCREENSHOTS"):
            time.sleep(1)  # charts grow into their place
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def _close_assistant(self) -> None:
        """MLflow offers a language model beside every page."""
        from selenium.webdriver.common.by import By

        for button in self.driver.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
            button.click()


@pytest.fixture(scope="module")
def page(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    opened = Page(server, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


def wait_for(condition: Callable[[], bool], described: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, described()
        time.sleep(0.2)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def experiment(finished: Finished) -> str:
    found = finished.place.client.get_experiment_by_name(EXPERIMENT)
    assert found is not None
    return f"/experiments/{found.experiment_id}"


def test_the_page_of_a_run(page: Page, experiment: str, two_transfers: list[str]) -> None:
    run = f"{experiment}/runs/{two_transfers[0]}"
    text = page.open(run, "transfer digits to animals (darts, seed 0)", "test/accuracy", "register")
    for part in (
        "registered model",  # of the description
        "random baseline",
        "relative_improvement",
        "cost/transfer_seconds",
        "search.supernet.channels",
        "network.channels",
        "train transferred, seed 0 on animals",
        "search on digits",
        "digits (",
        "Finished",
        "nas-animals",
        "supernet",
    ):
        assert part in text, part
    page.keep("ui-run")


@pytest.mark.parametrize(
    "picture", ["comparison", "learning_curves", "cells", "alphas", "confusion"]
)
def test_the_pictures_of_a_run(
    page: Page, experiment: str, two_transfers: list[str], picture: str
) -> None:
    path = f"pictures/{picture}.png"
    page.open(f"{experiment}/runs/{two_transfers[0]}/artifacts/{path}", f"{picture}.png")
    wait_for(lambda: max(page.widths_of_pictures(), default=0) > 800, lambda: page.text)


def test_two_runs_compared(page: Page, experiment: str, two_transfers: list[str]) -> None:
    first, second = two_transfers
    number = experiment.rpartition("/")[2]
    runs = f'/compare-runs?runs=["{first}","{second}"]&experiments=["{number}"]'
    text = page.open(runs, "Comparing 2 Runs", "Parallel Coordinates Plot", "test/accuracy")
    # parallel coordinates say something before anything is set up
    chosen = text.partition("Parameters:")[2].partition("Clear All")[0].split()
    assert "method" in chosen
    assert chosen[-1] == "test/accuracy"
    for part in ("darts", "pcdarts", "search.supernet.partial", "random/test_accuracy", "macs"):
        assert part in text, part
    page.keep("ui-compare")


def test_the_registry(page: Page, two_transfers: list[str]) -> None:
    text = page.open("/models/nas-animals", "Version 1", "champion", "test_accuracy")
    for part in ("10,000 animal silhouettes", "Version 2", "@ champion", "macs", "params"):
        assert part in text, part
    page.keep("ui-registry")
    text = page.open("/models/nas-animals/versions/1", "Source Run", "classes")
    for part in ("register nas-animals", "raw uint8 images", "validation_accuracy", "Giraffe"):
        assert part in text, part
