"""Make docs/screenshots again, from the reports and the MLflow store of this folder.

    make demo
    dvc exp run -S train.max_steps=100 -S train.learning_rate=1e-3
    dvc exp run -S train.max_steps=100 -S train.lora.r=8
    git checkout params.yaml dvc.lock reports && dvc checkout
    python -m tools.screenshots

It starts an MLflow server on loopback and looks at its pages with headless Chromium (Debian: chromium,
chromium-driver). The pages are those of the run in models/run.json and its version.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import project_root
from fintune.registry.recovery import RECORD, find_run
from fintune.registry.versions import version_of_run
from fintune.stage import read_json
from fintune.tracking.client import connect
from fintune.tracking.database import sqlite_uri

OUT = Path("docs/screenshots")
REPORT, PAGES = (1350, 1560), (1600, 1000)  # sizes of the browser's window
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
SECONDS = 60  # for a page, or the server
SETTLED = 3  # seconds that a page's charts take once its texts are there
CLOSED = ("mlflow.assistant.chat_panel.close", "mlflow.detect_issues.guidance.got_it")
TRAINING = "workflowType=machine_learning"  # the view for training


def pages() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the address of each picture within MLflow's UI, and texts that the page has when it is there."""
    client, record = connect(project_root()), read_json(paths.RUN, *RECORD)
    run_id = find_run(client, record)
    if run_id is None:
        raise UserError(f"{paths.RUN}: its run is not in this store; `python -m fintune restore`")
    run = client.get_run(run_id).info
    model = read_json(paths.EXPORT)["registered_model"]
    version = version_of_run(client, model, run_id)
    experiment = f"#/experiments/{run.experiment_id}"
    chosen = {
        "curves": (f"{experiment}/runs?compareRunsMode=CHART&{TRAINING}", ("curve",)),
        "models": (f"{experiment}/models?{TRAINING}", (str(run.run_name).replace(".", "·"),)),
        "answers": (f"{experiment}/runs/{run_id}/traces?{TRAINING}", ("correct_tuned", "TRUE")),
    }
    if version:
        address = f"#/models/{model}/versions/{version}?{TRAINING}"
        chosen["version"] = (address, (f"Version {version}", "Evaluated"))
    return chosen


@contextmanager
def server() -> Iterator[str]:
    """Serve this folder's store on a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    command += ["--backend-store-uri", sqlite_uri(project_root() / paths.MLFLOW_DATABASE)]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise UserError(f"{address}: no MLflow server within {SECONDS} s; its output is above")


@contextmanager
def chromium(size: tuple[int, int]) -> Iterator[webdriver.Chrome]:
    """Start a headless browser with a profile of its own."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        raise UserError("no Chromium (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory() as profile:
        own = (f"--user-data-dir={profile}", "--window-size={},{}".format(*size))
        for option in (*OPTIONS, *own):
            options.add_argument(option)
        page = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield page
        finally:
            page.quit()


def only_curves(page: webdriver.Chrome) -> None:
    """Show the charts of the curves alone, with the learning rate."""
    page.find_element(By.CSS_SELECTOR, "input[placeholder*='Search metric']").send_keys("curve")


def as_charts(page: webdriver.Chrome) -> None:
    """Show the models as charts."""
    toggle = page.find_element(By.CSS_SELECTOR, "input[name='view-mode'][value='CHART']")
    page.execute_script("arguments[0].click()", toggle)


ACTIONS = {"curves": only_curves, "models": as_charts}


def take(page: webdriver.Chrome, address: str, texts: tuple[str, ...], name: str) -> None:
    """Open a page, wait until it shows its texts, close what lies over it, and take its picture."""
    page.get(address)

    def shown() -> str:
        return str(page.execute_script("return document.body.innerText"))

    try:
        WebDriverWait(page, SECONDS).until(lambda _: all(text in shown() for text in texts))
    except TimeoutException:
        missing = ", ".join(text for text in texts if text not in shown())
        raise UserError(f"{address}: no {missing} on the page within {SECONDS} s") from None
    if act := ACTIONS.get(name):
        act(page)
    for _ in range(2):  # closing one can open another
        for each in CLOSED:
            for button in page.find_elements(By.CSS_SELECTOR, f"[data-component-id='{each}']"):
                page.execute_script("arguments[0].click()", button)
        time.sleep(SETTLED)
    page.save_screenshot(str(OUT / f"{name}.png"))
    print(OUT / f"{name}.png")


def main() -> None:
    """Take the pictures of the report and of MLflow's pages."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    chosen = pages()
    with chromium(REPORT) as page:
        take(page, paths.EVALUATION_PAGE.resolve().as_uri(), ("Evaluation:",), "report")
    with server() as address, chromium(PAGES) as page:
        for name, (path, texts) in chosen.items():
            take(page, address + path, texts, name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
