"""One model's answer on the page, and what the user says of it."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from fintune.errors import UserError, explain, first_line, redacted
from fintune.usage.exchanges import Exchange, Log
from fintune.usage.sides import Side

log = logging.getLogger("fintune")

SLOW_SECONDS = 5  # without a word, after which the page says that it waits


def text_element(tag: str, text: str) -> TextElement:
    """Return an element of HTML that shows a text as text."""
    return TextElement(tag=tag, text=text)


def explained(error: Exception) -> str:
    """Return why a model has no answer, in words and without secrets."""
    known = str(error) if isinstance(error, UserError) else explain(error)
    return redacted(known or f"the model failed ({type(error).__name__}: {first_line(error)})")


@dataclass
class Room:
    """State that all open pages share: the models, of which one answers at a time, and the exchanges."""

    sides: list[Side]
    log: Log
    stops: list[Event] = field(default_factory=list)  # one of each page
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))

    def end(self) -> None:
        """End the answers that are being generated."""
        for stop in self.stops:
            stop.set()
        self.pool.shutdown(cancel_futures=True)


class Answer:
    """The part of the page that shows one model's answer, and takes what the user says of it."""

    def __init__(self, room: Room, side: Side, exchange: Exchange) -> None:
        self.room, self.side, self.exchange = room, side, exchange
        self.texts: list[str] = []
        self.began = False
        with ui.element("section").classes("side").props(f'aria-label="{side.title} answer"'):
            self.title = text_element("h3", side.title)
            self.text = ui.label().classes("text").props("data-answer")
            self.state = ui.label("waits for its turn").classes("told").props("role=status")
            self.fault = ui.label().classes("fault").props("role=alert")
            self.feedback = ui.column().classes("w-full")

    async def fill(self, question: str, instruction: str | None, stop: Event) -> None:
        """Have the model answer, and show the text as it comes."""
        exchange, loop = self.exchange, asyncio.get_running_loop()
        begun = time.monotonic()

        def work() -> None:
            """Answer, and keep the exchange, also if the page is closed meanwhile."""
            self.began = True
            exchange.at = time.time()
            try:
                self.side.open()
                exchange.model, exchange.logged_model = self.side.identity()
                said = self.side.answer(
                    question, instruction, exchange.decoding, self.texts.append, stop
                )
                exchange.answer, exchange.ended = said.text, said.ended
                exchange.tokens, exchange.seconds = said.tokens, said.seconds
            except Exception as error:
                exchange.error = explained(error)
                if isinstance(error, UserError):  # no failure of the model
                    return
                log.warning("the page: %s failed", self.side.title, exc_info=error)
                exchange.answer = "".join(self.texts).strip()
                exchange.seconds = time.time() - exchange.at
            self.room.log.keep(exchange)

        done = loop.run_in_executor(self.room.pool, work)
        seen, since = 0, begun
        while not done.done():
            await asyncio.wait([done], timeout=0.1)
            if len(self.texts) > seen:
                seen, since = len(self.texts), time.monotonic()
                self.text.text = "".join(self.texts)
            self.state.text = self._state(time.monotonic() - since)
        done.result()
        self._show(stop.is_set())

    def _state(self, silent: float) -> str:
        if not self.began:
            return "waits for its turn"
        if self.side.opened is None:
            return "is being loaded"
        if silent >= SLOW_SECONDS:
            return "is slow: no word for some seconds; it is still at work, and Stop ends it"
        return "answers"

    def _show(self, stopped: bool) -> None:
        exchange = self.exchange
        self.text.text = exchange.answer
        if exchange.error:
            self.fault.text, self.state.text = f"No answer: {exchange.error}", "failed"
            return
        end = "ended" if exchange.ended else "was stopped" if stopped else "did not end: cut off"
        self.state.text = f"{end}; {exchange.tokens} tokens, {exchange.seconds:.1f} s"
        with self.feedback:
            with ui.row():
                self.right = ui.button("Right", icon="thumb_up", on_click=lambda: self.judge(True))
                self.wrong = ui.button(
                    "Wrong", icon="thumb_down", on_click=lambda: self.judge(False)
                )
            self._press()
            better = ui.textarea("A better answer").props("autogrow outlined").classes("w-full")
            ui.button("Save the correction", on_click=lambda: self.correct(better.value))
            self.where = ui.label().classes("told").props("role=status")

    def _press(self) -> None:
        for button, value in ((self.right, True), (self.wrong, False)):
            pressed = self.exchange.approved is value
            button.props(
                f"aria-pressed={str(pressed).lower()} {'' if pressed else 'outline'}",
                remove="outline" if pressed else "",
            )

    def judge(self, approved: bool) -> None:
        """Take a thumb up or down; the same once more takes it back."""
        self.exchange.approved = None if self.exchange.approved is approved else approved
        self._press()
        self.room.log.keep(self.exchange)

    def correct(self, text: str | None) -> None:
        """Take a better answer, which also says that this one was wrong; an empty one takes it back."""
        self.exchange.correction = (text or "").strip() or None
        if self.exchange.correction:
            self.exchange.approved = False
            self._press()
        self.room.log.keep(self.exchange)

    def tell_where(self) -> None:
        """Say where the exchange is."""
        self.title.text = f"{self.side.title}: {self.exchange.model}"
        if not hasattr(self, "where"):
            return
        said = []
        if self.exchange.correction:
            said.append("correction saved")
        if self.exchange.is_sent:
            said.append(f"in MLflow as {self.exchange.trace}")
        else:
            fault = f" ({self.room.log.fault})" if self.room.log.fault else ""
            said.append(f"kept in {self.room.log.folder.name} until MLflow has it{fault}")
        self.where.text = "; ".join(said)
