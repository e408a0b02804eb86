"""The page on which the model is asked, in a browser; all that it loads is on this machine."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from nicegui import app, ui
from nicegui.elements.mixins.text_element import TextElement

from fintune.errors import UserError, explain, first_line, redacted
from fintune.generation.decoding import title as decoding_title
from fintune.usage.exchanges import Exchange, Log
from fintune.usage.guard import Access, Guard
from fintune.usage.models import Said
from fintune.usage.sides import Side, check_settings

log = logging.getLogger("fintune")

SLOW_SECONDS = 5  # without a word, after which the page says that it waits
SHOWN = 20  # questions on the page
STYLE = """
body { font-family: system-ui, sans-serif; }
.nicegui-content { max-width: 75rem; margin: 0 auto; align-items: stretch; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; font-weight: 600; line-height: 1.4; margin: 0; }
h3 { font-size: 1rem; font-weight: 600; line-height: 1.4; margin: 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.side { border: 1px solid #767676; border-radius: .5rem; padding: .75rem; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.told { color: #424242; font-size: .9rem; overflow-wrap: anywhere; }
.fault { color: #a30000; font-weight: 600; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid #0b5394; outline-offset: 2px; }
"""
NUMBERS = {  # of the decoding: what they are called, and the step of a key press
    "temperature": ("Temperature (0: the most likely answer)", 0.1),
    "top_p": ("Top-p", 0.05),
    "min_p": ("Min-p", 0.01),
    "top_k": ("Top-k (0: all tokens)", 1),
    "repetition_penalty": ("Repetition penalty", 0.05),
    "max_new_tokens": ("Longest answer, in tokens", 16),
}


def _text(tag: str, text: str) -> TextElement:
    return TextElement(tag=tag, text=text)


def explained(error: Exception) -> str:
    """Return why a model has no answer, in words and without secrets."""
    known = str(error) if isinstance(error, UserError) else explain(error)
    return redacted(known or f"the model failed ({type(error).__name__}: {first_line(error)})")


@dataclass
class Room:
    """What all open pages share: the models, of which one answers at a time, and the exchanges."""

    sides: list[Side]
    log: Log
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))


class Answer:
    """The part of the page that shows one model's answer, and takes what the user says of it."""

    def __init__(self, room: Room, side: Side, exchange: Exchange) -> None:
        self.room, self.side, self.exchange = room, side, exchange
        self.texts: list[str] = []
        self.began = False
        with ui.element("section").classes("side").props(f'aria-label="{side.title} answer"'):
            self.title = _text("h3", side.title)
            self.text = ui.label().classes("text").props("data-answer")
            self.state = ui.label("waits for its turn").classes("told").props("role=status")
            self.fault = ui.label().classes("fault").props("role=alert")
            self.feedback = ui.column().classes("w-full")

    async def fill(self, question: str, instruction: str | None, stop: Event) -> None:
        """Have the model answer, and show the text as it comes."""
        exchange, loop = self.exchange, asyncio.get_running_loop()
        begun = time.monotonic()

        def work() -> Said:
            self.began = True
            exchange.at = time.time()
            self.side.open()
            return self.side.answer(
                question, instruction, exchange.decoding, self.texts.append, stop
            )

        done = loop.run_in_executor(self.room.pool, work)
        seen, since = 0, begun
        while not done.done():
            await asyncio.wait([done], timeout=0.1)
            if len(self.texts) > seen:
                seen, since = len(self.texts), time.monotonic()
                self.text.text = "".join(self.texts)
            self.state.text = self._state(time.monotonic() - since)
        try:
            said = done.result()
            exchange.answer, exchange.ended = said.text, said.ended
            exchange.tokens, exchange.seconds = said.tokens, said.seconds
        except Exception as error:
            if not isinstance(error, UserError):
                log.warning("the page: %s failed", self.side.title, exc_info=error)
            exchange.answer, exchange.error = "".join(self.texts).strip(), explained(error)
            exchange.seconds = time.monotonic() - begun
        self._show(stop.is_set())
        await loop.run_in_executor(None, self._keep_new)

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
                self.right = ui.button("👍 Right", on_click=lambda: self.judge(True))
                self.wrong = ui.button("👎 Wrong", on_click=lambda: self.judge(False))
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
        if self.exchange.correction and self.exchange.approved is None:
            self.exchange.approved = False
            self._press()
        self.room.log.keep(self.exchange)

    def _keep_new(self) -> None:
        """Say by which model this is, and keep it; without MLflow the model is named by its folder."""
        try:
            self.exchange.model, self.exchange.logged_model = self.side.identity()
        except Exception as error:
            log.info("MLflow: %s is not identified (%s)", self.side.title, first_line(error))
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


class Page:
    """One browser's page."""

    def __init__(self, room: Room, source: str) -> None:
        self.room, self.stop, self.answers = room, Event(), list[Answer]()
        tuned = room.sides[0]
        self.evaluated = tuned.decoding
        ui.colors(primary="#0b5394")
        ui.add_css(STYLE)
        ui.context.client.on_delete(self.stop.set)
        with ui.element("main").classes("w-full"):
            _text("h1", f"Ask {source}")
            self.question = ui.textarea("Question").props("autogrow outlined autofocus")
            self.passage = ui.textarea("Passage that the question is about (optional)")
            self.passage.props("outlined autogrow")
            with ui.expansion("Instruction and decoding").classes("w-full") as self.settings:
                self.instruction = ui.input("Instruction (empty: the usual one)").props("outlined")
                with ui.element("div").classes("sides"):
                    self.numbers = {
                        key: ui.number(label, value=self.evaluated[key], step=step)
                        for key, (label, step) in NUMBERS.items()
                    }
                ui.button("As evaluated", on_click=self.reset).props("outline")
            for each in (self.question, self.passage, self.instruction):
                each.classes("w-full q-mt-sm")
            self.shown = ui.label().classes("told").props("role=status")
            with ui.row().classes("items-center"):
                self.beside = {
                    side.title: ui.checkbox(f"Also ask: {side.title}") for side in room.sides[1:]
                }
            with ui.row():
                self.button = ui.button("Ask", on_click=self.ask)
                self.stopper = ui.button("Stop", on_click=self.stop.set).props("outline")
            ui.label("Ctrl+Enter in the question asks as well.").classes("told")
            self.question.on("keydown.ctrl.enter", self.ask)
            self.fault = ui.label().classes("fault").props("role=alert")
            self.list = ui.column().classes("w-full")
        self.stopper.disable()
        for number in self.numbers.values():
            number.on_value_change(self.tell)
        self.tell()
        ui.timer(0.5, lambda: [each.tell_where() for each in self.answers])

    def reset(self) -> None:
        """Set the decoding that the model was evaluated with."""
        for key, number in self.numbers.items():
            number.value = self.evaluated[key]

    def tell(self, *_: Any) -> None:
        """Say which decoding the next answer has, without opening the settings."""
        try:
            settings = self._settings()
        except UserError as error:
            self.shown.text = str(error)
            return
        same = " (as evaluated)" if settings == self.evaluated else " (changed)"
        most = settings["max_new_tokens"]
        self.shown.text = f"Decoding: {decoding_title(settings)}, at most {most} tokens{same}"

    def _settings(self) -> dict[str, float]:
        return check_settings({key: number.value for key, number in self.numbers.items()})

    async def ask(self) -> None:
        """Ask the models that are chosen, one after another."""
        if not self.button.enabled:
            return
        question, passage = (str(each.value or "") for each in (self.question, self.passage))
        instruction = (self.instruction.value or "").strip() or None
        self.fault.text = ""
        if not question.strip():
            self.fault.text = "Type a question first."
            return
        try:
            settings = self._settings()
        except UserError as error:
            self.fault.text = str(error)
            return
        self.button.disable()
        self.stopper.enable()
        self.stop.clear()
        chosen = [side for side in self.room.sides[1:] if self.beside[side.title].value]
        with self.list:
            block = ui.element("article").classes("w-full")
            block.move(target_index=0)
            with block:
                _text("h2", question).classes("text")
                with ui.element("div").classes("sides"):
                    new = [
                        Answer(
                            self.room,
                            side,
                            Exchange(question, side.title, dict(settings), passage, instruction),
                        )
                        for side in (self.room.sides[0], *chosen)
                    ]
        self.answers += new
        try:
            for each in new:
                if not self.stop.is_set():
                    await each.fill(each.exchange.input, instruction, self.stop)
        finally:
            self.button.enable()
            self.stopper.disable()
        for old in list(self.list)[SHOWN:]:
            old.delete()
        del self.answers[: -SHOWN * len(self.room.sides)]


def serve(
    room: Room, source: str, host: str, port: int, access: Access, ready: Callable[[], None]
) -> None:
    """Serve the page until it is interrupted."""
    app.add_middleware(Guard, access=access)
    app.on_startup(ready)

    def root() -> None:
        Page(room, source)

    ui.run(
        root,
        host=host,
        port=port,
        title=f"Ask {source}",
        language="en-US",
        show=False,
        reload=False,
        show_welcome_message=False,
    )
