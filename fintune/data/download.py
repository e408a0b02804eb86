"""Download a source from a URL: with a progress bar, and a limit on silence, not on length."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.data.unpacking import source_limit, too_large
from fintune.errors import RecordError, brief

SILENCE = 60.0  # seconds without a byte until a transfer is given up


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """Download what any URL leads to that fsspec opens, to a file for the time of the block.

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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "source"
        try:
            system, path = fsspec.url_to_fs(url, **options)
            system.get_file(path, str(file), callback=bar)
        except RecordError:
            raise
        except Exception as error:  # each protocol raises its own library's errors
            raise RecordError(f"{url}: {_reason(error)}") from error
        yield file


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
