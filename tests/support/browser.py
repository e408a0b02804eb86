"""Headless Chromium for tests of pages; without the browser or its driver, they are skipped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,1100",
)


@contextmanager
def chromium(profile: Path, **capabilities: Any) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield page
    finally:
        page.quit()


def wait_for_texts(page: webdriver.Chrome, *texts: str) -> None:
    """Wait until the page shows all texts.

    Raises:
        AssertionError: one is missing after a minute; lists the missing ones and the page's text.
    """

    def shown() -> str:
        return str(page.execute_script("return document.body.innerText"))

    try:
        WebDriverWait(page, 60).until(lambda _: all(text in shown() for text in texts))
    except Exception:
        missing = [text for text in texts if text not in shown()]
        raise AssertionError(f"{page.current_url} lacks {missing}:\n{shown()}") from None


def names_of_role(page: webdriver.Chrome, role: str) -> set[str]:
    """Return the texts of all elements with an ARIA role, explicit or implicit."""
    own = {"heading": "h1,h2,h3,h4", "link": "a[href]", "tab": "[role=tab]"}.get(role, "")
    selector = ",".join(filter(None, [f"[role={role}]", own]))
    return {each.text.strip() for each in page.find_elements(By.CSS_SELECTOR, selector)}
