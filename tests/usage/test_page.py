"""The page in a browser: by keyboard alone, on a narrow screen, with models that are slow or fail."""

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from mlflow.tracking import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fintune.registry.traces import TAG
from support.browser import chromium, wait_for_texts
from support.project import ROOT
from support.servers import free_port, running_server

DROPPED = ("MLFLOW_", "FINTUNE_", "PYTEST_")  # NiceGUI serves otherwise within pytest
LOGGED = {"goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}


@contextmanager
def served(folder: Path, *arguments: str, **extra: str) -> Iterator[str]:
    """Serve the page with stand-in models; yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "support.chat", str(port), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **extra}
    with running_server(command, port, environment, folder / "log") as address:
        yield address


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Return a folder with params.yaml and an empty MLflow store."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copy(ROOT / "recipes/demo.yaml", folder / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def address(project: Path) -> Iterator[str]:
    with served(project) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile"), **LOGGED) as page:
        yield page


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    browser.set_window_size(1500, 1100)
    browser.get(address)
    wait_for_texts(browser, "Ask stand-in")
    return browser


def focused(page: webdriver.Chrome) -> str:
    """Return the name of what has the keyboard."""
    return str(page.switch_to.active_element.accessible_name)


def press(page: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def tab_to(page: webdriver.Chrome, name: str) -> None:
    """Press Tab until what has this name has the keyboard."""
    seen = []
    for _ in range(40):
        if focused(page).startswith(name):
            return
        press(page, Keys.TAB)
        seen.append(focused(page))
    raise AssertionError(f"{name} is not reached: {seen}")


def ask(page: webdriver.Chrome, question: str) -> None:
    page.find_element(By.CSS_SELECTOR, "textarea[aria-label=Question]").send_keys(
        Keys.CONTROL + "a" + Keys.NULL, question, Keys.CONTROL + Keys.ENTER
    )


def also_ask(page: webdriver.Chrome, side: str) -> None:
    page.find_element(By.XPATH, f"//*[@role='checkbox'][contains(., 'Also ask: {side}')]").click()


def traces(project: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("financial-qa")
    assert experiment is not None
    found = client.search_traces(
        locations=[experiment.experiment_id], filter_string=f"tags.`{TAG}` IS NOT NULL"
    )
    return list(found)


def trace_of(project: Path, page: webdriver.Chrome, question: str) -> Callable[[Any], Any]:
    """Return a condition: MLflow has the first exchange with this question."""

    def found(_: Any) -> Any:
        asked = [t for t in traces(project) if t.data.spans[0].inputs["question"] == question]
        return asked[0] if asked else False

    return found


def test_by_keyboard_alone(page: webdriver.Chrome, project: Path) -> None:
    """Question, passage, both others, the answer, a thumb and a correction, without a pointer."""
    assert focused(page) == "Question"
    press(page, "What was the profit?", Keys.TAB)
    assert focused(page).startswith("Passage")
    press(page, "The profit was 5 million.")
    tab_to(page, "Also ask: base")
    press(page, Keys.SPACE)
    tab_to(page, "Also ask: champion")
    press(page, Keys.SPACE)
    tab_to(page, "Ask")
    press(page, Keys.ENTER)
    asked = "The profit was 5 million.\n\nWhat was the profit?"
    sides = ("tuned", "base", "champion")
    wait_for_texts(page, *(f"{side} read <b>{asked}</b>, instruction None, 0" for side in sides))
    wait_for_texts(page, "ended; ", "in MLflow as tr-")
    tab_to(page, "Wrong")
    press(page, Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "true"
    press(page, Keys.TAB)
    assert focused(page) == "A better answer"
    press(page, "5 million.", Keys.TAB)
    assert focused(page) == "Save the correction"
    press(page, Keys.ENTER)
    wait_for_texts(page, "correction saved; in MLflow as tr-")
    found = traces(project)
    assert sorted(trace.info.tags["fintune.model"] for trace in found) == [
        f"financial-qa/{length}" for length in (4, 5, 8)
    ]
    tuned = next(trace for trace in found if trace.info.tags["fintune.model"].endswith("/5"))
    assert tuned.data.spans[0].inputs == {
        "question": "What was the profit?",
        "passage": "The profit was 5 million.",
    }
    said = {each.name: each.value for each in tuned.info.assessments}
    assert said == {"approved": False, "expected_response": "5 million."}
    assert tuned.info.trace_metadata["decoding.repetition_penalty"] == "1.05"
    assert all(not trace.info.assessments for trace in found if trace is not tuned)


def test_all_that_it_loads_is_on_this_machine(page: webdriver.Chrome) -> None:
    page.get_log("performance")
    page.refresh()
    wait_for_texts(page, "Ask stand-in")
    ask(page, "offline?")
    wait_for_texts(page, "tuned read")
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 5
    assert not [
        u for u in urls if not u.startswith(("http://127.0.0.1:", "data:", "ws://127.0.0.1:"))
    ]
    assert not [each for each in page.get_log("browser") if each["level"] == "SEVERE"]


def test_texts_are_shown_as_texts(page: webdriver.Chrome) -> None:
    text = "<img src=x onerror=\"document.title='run'\"> {{ 7 * 7 }} **bold**"
    ask(page, text)
    wait_for_texts(page, f"tuned read <b>{text}</b>")
    assert page.find_element(By.CSS_SELECTOR, "article h2").text == text
    assert not page.find_elements(By.CSS_SELECTOR, "article img, article b, article strong")
    assert page.title == "Ask stand-in"


def test_on_a_narrow_screen_all_is_there_without_scrolling_sideways(page: webdriver.Chrome) -> None:
    page.set_window_size(500, 800)  # the narrowest that a window can be; the viewport is set below
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        for name in ("base", "champion"):
            also_ask(page, name)
        ask(page, "A" * 300)
        wait_for_texts(page, "tuned read", "base read", "champion read", "Save the correction")
        wide = page.execute_script(
            "const right = each => each.getBoundingClientRect().right;"
            "const all = [...document.querySelectorAll('button, textarea, input, [data-answer]')];"
            "const outside = all.filter(each => right(each) > 320).length;"
            "return [document.documentElement.scrollWidth, innerWidth, outside]"
        )
        assert wide == [320, 320, 0]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_failing_model_is_told_in_words_and_the_next_question_works(
    page: webdriver.Chrome, project: Path
) -> None:
    also_ask(page, "base")
    ask(page, "please break")
    wait_for_texts(
        page, "No answer: the model failed (RuntimeError: CUDA error: device-side assert)"
    )
    wait_for_texts(page, "base read <b>please break</b>")
    alert = [e.text for e in page.find_elements(By.CSS_SELECTOR, "[role=alert]") if e.text]
    assert alert == ["No answer: the model failed (RuntimeError: CUDA error: device-side assert)"]
    trace = WebDriverWait(page, 30).until(trace_of(project, page, "please break"))
    assert {str(t.info.state.value) for t in traces(project)} == {"OK", "ERROR"}, trace
    ask(page, "refuse this")
    wait_for_texts(page, "No answer: the question holds a special token; leave it out")
    ask(page, "again")
    wait_for_texts(page, "tuned read <b>again</b>")


def test_a_slow_model_is_told_and_stopped(page: webdriver.Chrome, project: Path) -> None:
    ask(page, "wait for me")
    wait_for_texts(page, "tuned read", "is slow: no word for some seconds")
    page.find_element(By.XPATH, "//button[normalize-space()='Stop']").click()
    wait_for_texts(page, "ended; ")
    ask(page, "cut it")
    wait_for_texts(page, "did not end: cut off")
    trace = WebDriverWait(page, 30).until(trace_of(project, page, "cut it"))
    assert trace.info.tags["fintune.ended"] == "false"


def test_a_changed_decoding_is_used_and_a_wrong_one_refused(page: webdriver.Chrome) -> None:
    wait_for_texts(page, "Decoding: greedy, penalty 1.05, at most 64 tokens (as evaluated)")
    page.find_element(By.XPATH, "//*[contains(text(), 'Instruction and decoding')]").click()
    WebDriverWait(page, 10).until(
        lambda _: page.find_element(By.CSS_SELECTOR, "[aria-label='Top-p']").is_displayed()
    )
    temperature = page.find_element(By.CSS_SELECTOR, "[aria-label^='Temperature']")
    temperature.send_keys(Keys.BACKSPACE * 3, "0.7")
    wait_for_texts(page, "temperature 0.7, penalty 1.05, at most 64 tokens (changed)")
    page.find_element(By.CSS_SELECTOR, "[aria-label^='Instruction']").send_keys("Be brief.")
    ask(page, "warm?")
    wait_for_texts(page, "tuned read <b>warm?</b>, instruction Be brief., 0.7")
    temperature.send_keys(Keys.BACKSPACE * 3, "9")
    wait_for_texts(page, "temperature: a number from 0 to 2 is needed")
    page.find_element(By.XPATH, "//button[normalize-space()='As evaluated']").click()
    wait_for_texts(page, "(as evaluated)")


def test_it_is_reached_by_its_own_name_alone(address: str) -> None:
    for headers in ({"Host": "attacker.example"}, {"Origin": "http://attacker.example"}):
        for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
            with pytest.raises(HTTPError) as refused:
                urlopen(Request(address + path, headers=headers), timeout=30)
            assert refused.value.code == 403


LOGIN = {"FINTUNE_CHAT_USER": "ann", "FINTUNE_CHAT_PASSWORD": "correct-horse"}
AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Serve on all addresses, with a password, and with an MLflow server that is away."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(ROOT / "recipes/demo.yaml", folder / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", folder)
    with served(folder, "0.0.0.0", **LOGIN, **AWAY) as address:
        yield address, folder


def test_elsewhere_it_asks_for_user_and_password(
    browser: webdriver.Chrome, elsewhere: tuple[str, Path]
) -> None:
    address, folder = elsewhere
    wrong = base64.b64encode(b"ann:correct-house").decode()
    for headers in ({}, {"Authorization": f"Basic {wrong}"}, {"Authorization": "Basic %"}):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(address, headers=headers), timeout=30)
        assert refused.value.code == 401
    browser.get(address.replace("//", "//ann:correct-horse@"))
    wait_for_texts(browser, "Ask stand-in")
    ask(browser, "inside?")
    wait_for_texts(browser, "tuned read <b>inside?</b>")
    assert "correct-horse" not in (folder / "log").read_text()


def test_while_mlflow_is_away_the_page_answers_and_says_where_exchanges_wait(
    browser: webdriver.Chrome, elsewhere: tuple[str, Path]
) -> None:
    address, folder = elsewhere
    browser.get(address.replace("//", "//ann:correct-horse@"))
    wait_for_texts(browser, "Ask stand-in")
    ask(browser, "Is it kept?")
    wait_for_texts(browser, "tuned read <b>Is it kept?</b>")
    wait_for_texts(browser, "until MLflow has it (no MLflow server responds at http://127.0.0.1:9")
    tab_to(browser, "Right")
    press(browser, Keys.ENTER)
    WebDriverWait(browser, 10).until(
        lambda _: browser.switch_to.active_element.get_attribute("aria-pressed") == "true"
    )
    kept = [json.loads(path.read_text()) for path in (folder / ".exchanges").glob("*.json")]
    asked = {each["question"]: each["approved"] for each in kept}
    assert asked["Is it kept?"] is True


def test_an_answer_whose_page_is_closed_ends_and_is_kept(
    page: webdriver.Chrome, project: Path
) -> None:
    ask(page, "wait and leave")
    wait_for_texts(page, "tuned read <b>wait and leave</b>")
    page.get("about:blank")
    trace = WebDriverWait(page, 50).until(trace_of(project, page, "wait and leave"))
    assert "wait and leave" in trace.data.spans[0].outputs
