"""Download a source from a URL: with a progress bar, and a limit on silence, not on length."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.data.unpacking import source_limit, too_large
from fintune.errors import RecordError, brief
from fintune.stage import write_text

log = logging.getLogger("fintune")
SILENCE = 60.0  # seconds without a byte until a transfer is given up
# by which servers state what they hold, as fsspec's file systems name it
SUMS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "VersionId")
TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")


@contextmanager
def downloaded(url: str, kept_in: Path | None = None) -> Iterator[Path]:
    """Download what any URL leads to that fsspec opens, to a file for the time of the block.

    Args:
        kept_in: a folder where the file is kept; one that is there is read, if the server states that it
            still holds the same.

    Raises:
        RecordError: the transfer failed; the message says why.
    """
    import fsspec  # slow to import, and only fetch needs it
    from fsspec.callbacks import TqdmCallback

    options: dict[str, Any] = {}
    if urlsplit(url).scheme in ("http", "https"):
        import aiohttp

        limit = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {"client_kwargs": {"timeout": limit, "trust_env": True}}
    limit_bytes = source_limit()

    class Bounded(TqdmCallback):  # type: ignore[misc]
        """A progress bar that ends a download at the limit."""

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit_bytes:
                raise RecordError(f"{url}{too_large('it sends')}")

    bar = Bounded(tqdm_kwargs={"desc": "download", "unit": "B", "unit_scale": True, "leave": False})
    with ExitStack() as stack:
        folder = kept_in or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        file, note = folder / f"{name}.source", folder / f"{name}.json"
        try:
            system, path = fsspec.url_to_fs(url, **options)
            state = _state(system, path) if kept_in else {}
            if state and _read(note) == state:
                log.info("%s: was downloaded before and is the same", url)
            else:
                note.unlink(missing_ok=True)
                system.get_file(path, str(file), callback=bar)
                if state:
                    with file.open("rb") as written:
                        os.fsync(
                            written.fileno()
                        )  # else a machine that dies can leave the note alone
                    write_text(note, json.dumps(state))
        except RecordError:
            raise
        except Exception as error:  # each protocol raises its own library's errors
            raise RecordError(f"{url}: {_reason(error)}") from error
        yield file


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):  # not there, or cut by a machine that died
        return None


def _state(system: Any, path: str) -> dict[str, str]:
    """Return what a server states of a file that would be another for other content; perhaps nothing."""
    try:
        about = system.info(path)
    except Exception:  # some servers answer no question of this kind, but send the file
        return {}
    found = {name: str(about[name]) for name in (*SUMS, *TIMES) if about.get(name)}
    return found and found | {"size": str(about.get("size"))}


def _reason(error: Exception) -> str:
    """Say why a transfer failed, and the way out."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "there is nothing at this address (404); check it"
    if status in (401, 403):
        return f"the server refuses it ({status}); a file that needs an account has to be downloaded by hand"
    if isinstance(status, int) and status:
        return f"the server answered {status} {getattr(error, 'message', '')}; try again later"
    if isinstance(error, TimeoutError):
        return f"nothing came for {SILENCE:g} seconds; run it again"
    kind = type(error).__name__
    if "Connect" in kind or isinstance(error, ConnectionError):
        return f"no connection: {brief(error)}; check the address and the network"
    if "Payload" in kind or "Disconnected" in kind:
        return f"the transfer broke off: {brief(error)}; run it again"
    return f"cannot be read: {kind}: {brief(error)}"
