"""The page served from a process of its own, by stand-in models that answer, are slow or fail."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from time import monotonic
from types import SimpleNamespace

from fintune.errors import UserError
from fintune.stage import prepare, run
from fintune.usage.card import Room
from fintune.usage.exchanges import Log
from fintune.usage.guard import access_to
from fintune.usage.models import Said
from fintune.usage.page import serve

DECODING = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_k": 0,
    "repetition_penalty": 1.05,
    "max_new_tokens": 64,
}


class StandIn:
    """A model that says what it was asked, and obeys words in the question."""

    def __init__(self, title: str) -> None:
        self.title = self.source = title
        self.opened, self.decoding = None, dict(DECODING)

    def open(self) -> None:
        self.opened = SimpleNamespace()

    def identity(self) -> tuple[str, str | None]:
        return f"financial-qa/{len(self.title)}", None

    def answer(
        self,
        question: str,
        instruction: str | None,
        settings: Mapping[str, float],
        take: Callable[[str], None],
        stop: Event,
    ) -> Said:
        begun = monotonic()
        if "refuse" in question:
            raise UserError("the question holds a special token; leave it out")
        if "break" in question and self.title != "base":
            raise RuntimeError("CUDA error: device-side assert\nwith more lines")
        text = f"{self.title} read <b>{question}</b>, instruction {instruction}, {settings['temperature']:g}"
        for word in text.split(" "):
            take(f"{word} ")
        if "wait" in question:
            stop.wait(60)
        return Said(text, len(text.split(" ")), monotonic() - begun, "cut" not in question)


def main(port: int, host: str = "127.0.0.1") -> None:
    log = Log(Path.cwd())
    log.start()
    sides = [StandIn(title) for title in ("tuned", "base", "champion")]
    access = access_to(host)
    serve(Room(sides, log), "stand-in", host, port, access, lambda: None)  # type: ignore[arg-type]


if __name__ == "__main__":
    prepare()
    given = sys.argv[1:]
    run(lambda: main(int(given[0]), *given[1:]), interrupted="interrupted")
