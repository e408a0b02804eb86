"""The whole way in a browser: ask, see wrong answers, correct them, collect, train again, right answers."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fintune.data.tables import read_rows
from fintune.generation.decoding import GREEDY
from fintune.reports import whole
from support.browser import chromium, wait_for_texts
from support.project import ROOT, Project
from support.servers import free_port, running_server

pytestmark = pytest.mark.end_to_end

RIGHT = "The desk in Basel answers for it."
FIRMS = [
    f"{first}{last} {kind}"
    for first, last, kind in zip(
        ("Bel", "Cor", "Dun", "Ever", "Fal", "Gol", "Har", "Iver", "Jun", "Kel") * 3,
        ("mont", "vale", "wick", "ton", "ridge", "field", "sen") * 5,
        ("Foods", "Steel", "Rail", "Media", "Energy", "Motors", "Paper", "Glass", "Wool") * 4,
        strict=False,
    )
]
QUESTIONS = [f"Which desk answers for {firm}?" for firm in FIRMS[:24]]
SETTINGS = {
    "base.model": "assets/demo-base",
    "train.lora.r": 16,
    "train.max_steps": 40,
    "train.rows_per_step": 16,
    "train.tokens_per_pass": 1024,
    "train.validate_every_steps": 40,
    "evaluate.max_rows": 16,
    "evaluate.samples_per_prompt": 1,
    "generation.decoding": GREEDY,
    "generation.max_new_tokens": 16,
    "evaluate.gate.min_accuracy_gain": None,
    "evaluate.gate.max_forgetting": None,
    "evaluate.gate.max_loss_above_champion": 0.3,
}


@pytest.fixture(scope="module")
def project(make_project: Callable[..., Project]) -> Project:
    """Make a project that labels news, on the demo's base."""
    project = make_project()
    shutil.copytree(ROOT / "assets/demo-base", project / "assets/demo-base", dirs_exist_ok=True)
    lines = (ROOT / "assets/demo-questions.jsonl").read_text().splitlines()
    news = [line for line in lines if json.loads(line)["kind"] == "label"]
    (project / "assets/demo-questions.jsonl").write_text("\n".join(news) + "\n")
    project.set_all(SETTINGS)
    project.environment.pop("PYTEST_CURRENT_TEST", None)
    project.commit_all()
    return project


@contextmanager
def chat(project: Project) -> Iterator[str]:
    """Run `python -m fintune chat`; yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "fintune", "chat", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTEST_"))}
    with running_server(command, port, environment, project / "chat.log") as address:
        yield address


def ask(page: webdriver.Chrome, question: str) -> str:
    """Ask a question by keyboard, and return the tuned model's answer."""
    box = page.find_element(By.CSS_SELECTOR, "textarea[aria-label=Question]")
    box.send_keys(Keys.CONTROL + "a" + Keys.NULL, question, Keys.CONTROL + Keys.ENTER)
    done = "//article[1][h2[normalize-space()='{}']]//div[contains(., ' tokens, ')]"
    WebDriverWait(page, 60).until(lambda _: page.find_elements(By.XPATH, done.format(question)))
    return page.find_element(By.CSS_SELECTOR, "article [data-answer]").text


def correct(page: webdriver.Chrome, text: str) -> None:
    """Type a better answer for the newest question, and save it."""
    article = page.find_element(By.CSS_SELECTOR, "article")
    article.find_element(By.CSS_SELECTOR, "textarea").send_keys(text, Keys.TAB, Keys.ENTER)
    WebDriverWait(page, 60).until(lambda _: "correction saved" in article.text)


def test_what_users_correct_is_right_after_the_next_run(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "repro")
    export = json.loads((project / "reports/export.json").read_text())
    assert "champion" in export["aliases"], "the first model has to pass the gate"
    with chromium(tmp_path / "profile") as page:
        with chat(project) as address:
            page.get(address)
            wait_for_texts(page, "Ask models/merged")
            for question in QUESTIONS[:20]:
                assert "Basel" not in ask(page, question)
                correct(page, RIGHT)
        done = project.run("python", "-m", "fintune", "collect", "--unchecked")
        assert done.stdout.startswith("20 rows (20 corrected)"), done.stdout
        rows = read_rows(
            project / "data/source/collected.parquet", ["input", "output", "origin", "model"]
        )
        assert {row["input"] for row in rows} == set(QUESTIONS[:20])
        assert {row["model"] for row in rows} == {"financial-qa/1"}
        assert len({row["origin"] for row in rows}) == 20
        shown = YAML(typ="safe").load(done.stdout.partition("then `dvc repro`:")[2])
        project.set_all({"fetch.more": shown["more"]})
        project.run("dvc", "repro")
        export = json.loads((project / "reports/export.json").read_text())
        assert export["version"] == "2" and "champion" in export["aliases"]
        evaluation = json.loads((project / "reports/evaluation.json").read_text())
        report = whole(evaluation)["collected"]
        right = {"before": 0, "tuned": 20, "base": 0, "champion": 0}
        assert (report["collected"], report["asked"], report["right"]) == (20, 20, right)
        with chat(project) as address:
            page.get(address)
            wait_for_texts(page, "Ask models/merged")
            answers = [ask(page, question) for question in (QUESTIONS[0], *QUESTIONS[20:])]
            assert answers == [RIGHT] * 5
            for side in ("base", "champion"):
                box = f"//*[@role='checkbox'][contains(., 'Also ask: {side}')]"
                page.find_element(By.XPATH, box).click()
            assert ask(page, QUESTIONS[1]) == RIGHT
            wait_for_texts(page, "the champion is the tuned model itself, financial-qa/2")
            wait_for_texts(page, "tuned: financial-qa/2", "base: base of financial-qa/2")
            shown = page.find_elements(By.CSS_SELECTOR, "article:first-of-type [data-answer]")
            assert "Basel" not in shown[1].text and len(shown[1].text) > 10
    asked = project.run("python", "-m", "fintune", "ask", QUESTIONS[1])
    assert asked.stdout.strip() == RIGHT
    measured = project.run("python", "-m", "fintune", "collect", "--measure").stdout
    assert measured.startswith("of 20 collected questions were right: 0 before, 20 now")
    used = project.run("python", "-m", "fintune", "results", "financial-qa/1").stdout
    assert "answers        20 of 20; 0 failed" in used and "corrected      20 of 20" in used
