"""Progress where nobody watches: a line now and then instead of bars that are drawn over themselves."""

import time
from typing import Any

SECONDS = 10  # between two lines of a bar; a shorter one says nothing
LINE = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, {remaining} left, {rate_fmt}{postfix}"


def write_lines() -> None:
    """Let all bars of tqdm write lines, also those of libraries, which are subclasses."""
    from tqdm.std import tqdm

    tqdm.display, tqdm.clear, tqdm.close = _display, _nothing, _close


def _display(bar: Any, msg: str | None = None, pos: int | None = None) -> None:
    now = time.monotonic()
    if now - bar.__dict__.setdefault("last_line", now) < SECONDS:
        return
    bar.last_line = now
    line = msg or bar.format_meter(**bar.format_dict | {"bar_format": LINE})
    bar.fp.write(f"{line.removeprefix(': ')}\n")
    bar.fp.flush()


def _nothing(bar: Any, *_: Any, **__: Any) -> None:
    """Leave the line above as it is."""


def _close(bar: Any) -> None:
    if not bar.disable:
        bar.disable = True
        bar._decr_instances(bar)
