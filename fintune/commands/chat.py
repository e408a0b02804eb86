"""Ask the model on a page in the browser, beside base and champion, and say what is right.

python -m fintune chat                                   # the merged model, on http://127.0.0.1:8600
python -m fintune chat --model financial-qa@champion
"""

import argparse
import importlib.util
import logging
import socket

from fintune import paths
from fintune.errors import UserError

PORT = 8600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model and the page's address."""
    parser.add_argument(
        "--model",
        default=str(paths.MERGED),
        help="a folder, NAME@ALIAS or NAME/VERSION; default: %(default)s",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="another than loopback only with FINTUNE_CHAT_USER and FINTUNE_CHAT_PASSWORD",
    )
    parser.add_argument("--port", type=int, default=PORT, help="default: %(default)s")


def main(given: argparse.Namespace) -> None:
    """Open the model, and serve the page until Ctrl-C."""
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("the page needs nicegui: `pip install nicegui`")
    from fintune.usage.guard import access_to

    access = access_to(given.host)
    check_port(given.host, given.port)
    from transformers.utils.logging import disable_progress_bar

    from fintune.lineage import project_root
    from fintune.params import read_name, read_params
    from fintune.tracking.client import UNNAMED, connect
    from fintune.usage.card import Room
    from fintune.usage.exchanges import Log
    from fintune.usage.page import serve
    from fintune.usage.sides import sides_of

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = project_root()
    sides = sides_of(
        given.model,
        read_name() or UNNAMED,
        lambda: connect(root),
        lambda: read_params().generation,
    )
    log = Log(root)
    log.start()
    host = f"[{given.host}]" if ":" in given.host else given.host
    address = f"http://{host}:{given.port}"
    serve(
        Room(sides, log),
        given.model,
        given.host,
        given.port,
        access,
        lambda: print(f"{given.model} answers at {address}   (Ctrl-C ends it)", flush=True),
    )


def check_port(host: str, port: int) -> None:
    """Check that the address is free, before a model is loaded.

    Raises:
        UserError: it is taken, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}:{port} cannot be used ({error}); name another with --port or --host"
        ) from None
