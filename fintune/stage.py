"""What every stage does: start, report a user's mistake without a traceback, write its files whole."""

import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fintune.params import UserError
from fintune.records import RecordError

log = logging.getLogger("fintune")


def run(main: Callable[[], None]) -> None:
    """Run a stage's main; a mistake of the user's ends it with one message and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, not for users
    try:
        main()
    except (UserError, RecordError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; `dvc repro` goes on from here")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a metrics or manifest file, whole or not at all.

    Raises:
        ValueError: a number is not finite; DVC and MLflow would read it in different ways.
    """
    text = json.dumps(_rounded(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` only when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def project_root() -> Path:
    """The folder of the checkout that the user works in.

    `dvc exp run --temp` and queued experiments run in a copy below `.dvc/tmp/exps` that is deleted
    afterwards; what must outlive it (the MLflow database, checkpoints) belongs to the real root.
    """
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: what is measured, without the noise of the last bits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value
