"""The evaluation's page: its content, its independence of other files, and its display in a browser."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fintune.evaluation.breakdown import break_down, calibration_curve, extremes
from fintune.evaluation.page import render, visible
from fintune.evaluation.statistics import compare, summarize
from fintune.metrics import METRICS, number
from fintune.model.likelihood import BINS
from fintune.params import Evaluate, read_params
from support.browser import chromium

ROOT = Path(__file__).parents[2]
ROWS = 50
HOSTILE = {
    "script": "</p><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">",
    "template": "{{ 7 * 7 }} {% raw %} &lt;b&gt; <b>bold</b>",
    "markdown": "# not a heading\n**not bold** [link](javascript:alert(1))\n\n| a | b |",
    "right to left": "שלום עולם, ריבית של 5%. مرحبا",
    "turned round": "abc \u202e detrevni \u2066 end",
    "long word": "w" * 900,
    "emoji": "📈👩‍💻🏳️‍🌈 1️⃣",
    "control": "a\x00b\x07c\x1b[31md\x7fe\x85f",
    "lines": "one\n  two\ttabbed\r\nthree",
}


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    monkeypatch.chdir(ROOT)
    return read_params().evaluate


def sums(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    tokens, one = generator.integers(1, 30, ROWS).astype(float), np.ones(ROWS)
    nll = generator.gamma(4, 1 + 1 / (1 + seed), ROWS) * tokens
    return {n: (generator.random(ROWS), one) for n in METRICS if n != "similarity"} | {
        "loss": (nll, tokens),
        "perplexity": (nll, tokens),
    }


@pytest.fixture
def content() -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, float | None]]]:
    """Return a complete report, predictions of hostile texts, and a curve."""
    texts = list(HOSTILE.values())
    rows = [
        {"instruction": texts[i % len(texts)], "input": f"{i} {texts[i % len(texts)]}", "output": "a " * i}
        | {"kind": texts[i % 3]}
        for i in range(ROWS)
    ]  # fmt: skip
    base, tuned, champion = sums(0), sums(1), sums(2)
    questions = [str(i) for i in range(ROWS)]
    worst, best = extremes(base, tuned)
    curve = calibration_curve(np.random.default_rng(0).random((BINS, 3)) * 9 + 1)
    reason = f"a reason with {HOSTILE['script']}"
    report = {
        "base": summarize(base) | {"chrf": None},
        "tuned": summarize(tuned),
        "improvement": compare(base, tuned, questions, 50, 0),
        "champion": {
            "compared": True,
            "version": "3",
            "run": "r" * 32,
            "reason": "",
            "note": "it may have seen these rows",
            "broken": False,
            "metrics": summarize(champion),
            "improvement": compare(champion, tuned, questions, 50, 0),
        },
        "forgetting": {
            "base": 3.0,
            "tuned": 3.5,
            "champion": 3.1,
            "passages": 60,
            "rise": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
        "collected": {
            "collected": 9,
            "asked": 8,
            "trained": 7,
            "right": {"before": 1, "tuned": 6, "base": 2, "champion": 4},
        },
        "harness": {"a_task": {"acc": {"base": 0.5, "base_stderr": 0.1, "tuned": 0.625}}},
        "decoding": {
            "title": "temperature 1, min-p 0.1",
            "reason": f"temperature 1, min-p 0.1: {HOSTILE['template']}",
            "candidates": [
                {"title": "temperature 1, min-p 0.1", "prompts": 40, "rouge_1": 0.3},
                {"title": "greedy", "prompts": 20, "rouge_1": 0.1},
            ],
            "samples_per_prompt": 3,
            "choice_seconds": 1.5,
            "answer_seconds": 2.5,
        },
        "greedy": {"base": summarize(base), "tuned": summarize(champion)},
        "rows": ROWS,
        "questions": ROWS,
        "gate": {
            "passed": False,
            "reason": reason,
            "rules": [
                {"rule": "min_stop_rate", "passed": False, "reason": reason},
                {"rule": "max_forgetting", "passed": True, "reason": "up by 0.6"},
            ],
        },
        "calibration": {"base": curve, "tuned": curve},
        "breakdown": break_down(rows, base, tuned),
        "worst_rows": worst,
        "best_rows": best,
        "evaluated": {"base": "b" * 80, "adapter_run": "f" * 32, "base_revision": None},
    }
    table = [
        {
            "instruction": row["instruction"],
            "question": row["input"],
            "reference": texts[(i + 1) % len(texts)],
            "base": texts[(i + 2) % len(texts)],
            "tuned": texts[(i + 3) % len(texts)] if i != 1 else "",
            "tuned_greedy": texts[(i + 4) % len(texts)],
            "base_right": None,
            "tuned_right": i % 2 == 0,
            "base_stopped": False,
            "tuned_stopped": True,
            "base_loss": 3.0 + i / 10,
            "tuned_loss": 2.0,
            "base_rouge_l": 0.1,
            "tuned_rouge_l": 0.5,
        }
        for i, row in enumerate(rows)
    ]
    steps: list[dict[str, float | None]] = [
        {"step": float(k), "loss": 3.0 - k / 9, "validation_loss": 2.0 if k % 3 == 0 else None}
        for k in range(1, 10)
    ]
    return report, table, steps


@pytest.fixture
def page(content: Any, params: Evaluate) -> str:
    return render(*content, params)


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_runs_nothing(page: str) -> None:
    found = Elements(page)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {t for t, _ in found.tags}
    for tag, attributes in found.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "srcset", "action", "data"):
                assert value and value.startswith(("#", "data:")), (tag, key, value)
    styles = re.findall(r"url\(([^)]*)\)|@import", page)
    assert all(address.startswith("#") for address in styles)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'(?:url\(#|href="#)([^)"]*)', page)
    assert set(wanted) <= set(ids) and wanted


def test_the_verdict_comes_first_with_every_rule(page: str) -> None:
    text = Elements(page[page.index("<body") :]).text.split("Metrics")[0]
    assert "Evaluation: failed" in " ".join(text.split())
    assert "min_stop_rate" in text and "max_forgetting" in text and "up by 0.6" in text


def test_metrics_champion_forgetting_and_harness_are_there(page: str) -> None:
    text = " ".join(Elements(page).text.split())
    for title in (metric.title for key, metric in METRICS.items() if key != "similarity"):
        assert title in text
    for piece in ("Likeness", "harness_"):
        assert piece not in text
    assert "Of 9 questions whose answers users corrected or approved, 8 are in the data" in text
    assert "inuse,before1of8tuned6of8base2of8champion4of8" in text.replace(" ", "")
    for piece in ("not a number", "a rise of 0.5", "a_task", "0.625", "version 3", "may have seen"):
        assert piece in text


def test_greedy_figures_are_shown_where_they_are_others(content: Any, params: Evaluate) -> None:
    report, table, curve = content
    assert "Greedy answers of the tuned model" in render(report, table, curve, params)
    report = {key: value for key, value in report.items() if key != "greedy"}
    assert "Greedy answers of the tuned model" not in render(report, table, curve, params)


def test_equal_evaluations_give_equal_pages(content: Any, params: Evaluate) -> None:
    assert render(*content, params) == render(*content, params)


def test_a_page_can_show_a_model_whose_numbers_are_none(content: Any, params: Evaluate) -> None:
    report, table, curve = content
    lost = dict.fromkeys(("value", "low", "high"))
    report["tuned"] = dict.fromkeys(report["tuned"])
    report["improvement"] = dict.fromkeys(report["improvement"], lost)
    report["forgetting"] |= {"tuned": None, "rise": lost}
    report["calibration"]["tuned"] = {"calibration_error": None, "bins": [
        {"tokens": 3, "confidence": None, "accuracy": 0.0},
    ]}  # fmt: skip
    for part in (part for parts in report["breakdown"].values() for part in parts):
        part |= {"tuned_loss": None}
    for row, loss in zip(table, (float("nan"), float("inf")), strict=False):
        row["tuned_loss"] = loss
    text = Elements(render(report, table, curve, params)).text
    assert "not a number" in text and not re.search(r"\b(nan|inf)\b", text)


def test_numbers_as_a_person_reads_them() -> None:
    assert [number(v) for v in (0.12345, -1.5, 12345.6, 0.0, None)] == [
        "0.1235", "−1.5", "12,346", "0", "not a number",
    ]  # fmt: skip


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\x00b\x1b\u202ec\x85\n\td👩‍💻") == "a␀b␛[U+202E]c[U+0085]\n\td👩‍💻"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    logs = {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
    with chromium(tmp_path_factory.mktemp("profile"), **logs) as opened:
        yield opened


def show(browser: Any, page: str, folder: Path, width: int) -> None:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.get_log("browser"), browser.get_log("performance")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_requests_or_overflow(
    browser: Any, page: str, tmp_path: Path, width: int
) -> None:
    show(browser, page, tmp_path, width)
    assert browser.get_log("browser") == []
    requests = re.findall(
        r'"url":"(\w+):', " ".join(e["message"] for e in browser.get_log("performance"))
    )
    assert set(requests) <= {"file", "data"}
    assert browser.title == "Evaluation: failed"
    script = "return document.documentElement.scrollWidth"
    assert browser.execute_script(script) <= width
    wide = browser.execute_script(
        """return [...document.querySelectorAll("p, h1, h2, h3, summary, dd, figure, .text")]
        .filter(e => e.getBoundingClientRect().right > arguments[0] + 0.5).map(e => e.outerHTML)""",
        width,
    )
    assert wide == []
    narrow = browser.execute_script(
        """return [...document.querySelectorAll(".stack th[scope=row], .text, dd")]
        .filter(e => e.getBoundingClientRect().width < 90).map(e => e.outerHTML)"""
    )
    assert narrow == []


def test_hostile_texts_are_shown_as_texts(
    browser: Any, page: str, tmp_path: Path, content: Any
) -> None:
    show(browser, page, tmp_path, 1280)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('article .text p')].map(e => e.textContent)"
    )
    for name, text in HOSTILE.items():
        expected = visible(text).replace("\r\n", "␍\n")
        assert expected in shown, name
    inside = "return document.querySelectorAll('article p *, article h3 *, summary [dir] *').length"
    assert browser.execute_script(inside) == 0
    directions = browser.execute_script(
        """return [...document.querySelectorAll('article .text p')]
        .map(e => [e.textContent, getComputedStyle(e).direction])"""
    )
    assert next(d for t, d in directions if t.startswith("שלום")) == "rtl"
    assert {d for t, d in directions if t.startswith("www")} == {"ltr"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(
    browser: Any, page: str, tmp_path: Path, scheme: str
) -> None:
    """Each text colour has a contrast of at least 4.5 to 1 (WCAG AA)."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    show(browser, page, tmp_path, 1280)
    colors = browser.execute_script(
        """const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(["paper", "card", "ink", "soft", "base", "tuned", "good", "bad"]
            .map(n => [n, style.getPropertyValue("--" + n).trim()]))"""
    )
    assert browser.execute_script("return getComputedStyle(document.body).color") == (
        "rgb({}, {}, {})".format(*bytes.fromhex(colors["ink"][1:]))
    )

    def luminance(color: str) -> float:
        parts = [value / 255 for value in bytes.fromhex(color[1:])]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("paper", "card"):
        for name in ("ink", "soft", "good", "bad", "tuned"):
            dark, light = sorted((luminance(colors[ground]), luminance(colors[name])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, ground, name)
