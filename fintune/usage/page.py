"""The page on which the model is asked, in a browser; all that it loads is on this machine."""

from collections.abc import Callable
from threading import Event
from typing import Any

from nicegui import app, ui

from fintune.errors import UserError
from fintune.generation.decoding import title as decoding_title
from fintune.usage.card import Answer, Room, text_element
from fintune.usage.exchanges import Exchange
from fintune.usage.guard import Access, Guard
from fintune.usage.sides import check_settings

SHOWN = 30  # questions on the page
STYLE = """
body { font-family: system-ui, sans-serif; }
.nicegui-content { max-width: 75rem; margin: 0 auto; align-items: stretch; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; font-weight: 600; line-height: 1.4; margin: 0; }
h3 { font-size: 1rem; font-weight: 600; line-height: 1.4; margin: 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.side { border: 1px solid #767676; border-radius: .5rem; padding: .75rem; min-width: 0; }
article { border-top: 1px solid #767676; padding-top: .75rem; }
.sides { margin-top: .5rem; } .side > * + * { margin-top: .4rem; }
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


class Page:
    """One browser's page."""

    def __init__(self, room: Room, source: str) -> None:
        self.room, self.stop, self.answers = room, Event(), list[Answer]()
        room.stops.append(self.stop)
        tuned = room.sides[0]
        self.evaluated = tuned.decoding
        ui.colors(primary="#0b5394")
        ui.button.default_props("no-caps")
        ui.add_css(STYLE)
        ui.context.client.on_delete(self.stop.set)
        with ui.column().classes("w-full"):
            text_element("h1", f"Ask {source}")
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
        ui.timer(0.5, self.tell_where)

    def tell_where(self) -> None:
        """Say where the exchanges are."""
        for each in self.answers:
            each.tell_where()

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
                text_element("h2", question).classes("text")
                with ui.element("div").classes("sides"):
                    new = [
                        Answer(
                            self.room,
                            side,
                            Exchange(question, side.source, dict(settings), passage, instruction),
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
    app.on_shutdown(room.end)

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
