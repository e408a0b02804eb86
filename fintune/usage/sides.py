"""Models side by side: the one that is asked, its base, and the champion."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Event
from time import monotonic

from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import UserError
from fintune.generation.decoding import SETTINGS
from fintune.params import Generation
from fintune.usage.identity import identify
from fintune.usage.models import (
    Opened,
    Said,
    answer,
    load,
    open_model,
    settings_of,
    with_settings,
)

log = logging.getLogger("fintune")
AGAIN_SECONDS = 60  # until MLflow is asked again


@dataclass
class Side:
    """A model on the page; it is opened when it is first asked."""

    title: str
    source: str
    opens: Callable[[], Opened]
    names: Callable[[], tuple[str, str | None]]  # asks MLflow
    opened: Opened | None = None
    known: tuple[str, str | None] | None = None
    asked: float = -AGAIN_SECONDS  # when MLflow did not say it

    def open(self) -> Opened:
        """Load the model, once.

        Raises:
            UserError: it cannot be.
        """
        if self.opened is None:
            self.opened = self.opens()
        return self.opened

    @property
    def decoding(self) -> dict[str, float]:
        """The settings and `max_new_tokens` that it was evaluated with."""
        return settings_of(self.open().config)

    def identity(self) -> tuple[str, str | None]:
        """Return NAME/VERSION of the model, and MLflow's id of it, if it has one.

        While MLflow is away, the model is called as it was asked for.
        """
        if self.known is None and monotonic() - self.asked >= AGAIN_SECONDS:
            try:
                self.known = self.names()
            except Exception as error:  # each store raises its own library's errors
                self.asked = monotonic()
                log.warning("MLflow does not say which version %s is: %s", self.source, error)
        return self.known or (self.source, None)

    def answer(
        self,
        question: str,
        instruction: str | None,
        settings: Mapping[str, float],
        take: Callable[[str], None],
        stop: Event,
    ) -> Said:
        """Answer a question with these settings, and give the text on as it is generated."""
        opened = self.open()
        changed = settings != settings_of(opened.config)
        config = with_settings(opened.config, settings) if changed else opened.config
        return answer(opened, question, instruction, take, config, stop)


def sides_of(
    source: str, name: str, client: Callable[[], MlflowClient], given: Callable[[], Generation]
) -> list[Side]:
    """Return the sides of a page: the tuned model, opened, then base and champion.

    Args:
        source: a folder, NAME@ALIAS or NAME/VERSION.
        name: of the registered model whose champion is shown.
        client: connects to MLflow.
        given: reads the parameters, for a model without a decoding of its own.

    Raises:
        UserError: the tuned model cannot be opened.
    """
    champion = f"{name}@champion"

    def is_one(opened: Opened) -> Opened:
        if tuned.identity()[0] == identify(client(), champion)[0]:
            raise UserError(f"the champion is the tuned model itself, {tuned.identity()[0]}")
        return opened

    def base() -> Opened:
        opened = tuned.open()
        if not opened.has_adapter:  # the base is not in a merged model
            opened = load(paths.ADAPTER, given)
        return replace(opened, adapted=False)

    def version() -> tuple[str, str | None]:
        return f"base of {identify(client(), source)[0]}", None

    tuned = Side(
        "tuned", source, lambda: open_model(source, given), lambda: identify(client(), source)
    )
    tuned.open()
    return [
        tuned,
        Side("base", f"base of {source}", base, version),
        Side(
            "champion",
            champion,
            lambda: is_one(open_model(champion, given)),
            lambda: identify(client(), champion),
        ),
    ]


def check_settings(settings: Mapping[str, float | None]) -> dict[str, float]:
    """Check decoding settings that were typed.

    Raises:
        UserError: one is missing, or out of its range.
    """
    limits = {
        "temperature": (0, 2),
        "top_p": (0.01, 1),
        "min_p": (0, 1),
        "top_k": (0, 100_000),
        "repetition_penalty": (0.5, 2),
        "max_new_tokens": (1, 4096),
    }
    found = {}
    for key in (*SETTINGS, "max_new_tokens"):
        value, (low, high) = settings.get(key), limits[key]
        if value is None or not low <= value <= high:
            raise UserError(f"{key.replace('_', ' ')}: a number from {low:g} to {high:g} is needed")
        whole = key in ("top_k", "max_new_tokens")
        found[key] = int(value) if whole else float(value)
    return found
