"""Errors with a message for the user: what is wrong, its value and how to fix it.

UserError           input, parameters or environment; a stage or command prints it and exits with 1
    RecordError     a table: the file, the row and the column

`explain` puts the errors of the surroundings into words: a full disk, a server that died. They can come out
of any library at any line, so stages and commands catch them in one place.
"""

import errno
import os
import re

ANOTHER_STORE = "or unset MLFLOW_TRACKING_URI to log to mlflow.db in this folder"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_TEXT = re.compile(  # of libraries written in Rust and C, which raise no OSError
    rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)|No space left on device|Disk quota exceeded"
    "|database or disk is full|PytorchStreamWriter failed writing file",
)
STORES = {"mlflow", "sqlalchemy", "psycopg", "psycopg2", "pymysql", "boto3", "botocore", "sqlite3"}
SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSPHRASE|API_?KEY", re.IGNORECASE)
SIGNED = re.compile(
    r"([?&][\w.-]*(?:token|signature|credential|secret|password|sig|key)[\w-]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
NETWORK = {"requests", "urllib3", "httpx", "httpcore", "socket", "ssl"}


class UserError(Exception):
    """Error in the user's input, parameters or environment; the message includes the fix."""


class RecordError(UserError):
    """Error in a table's format or contents; the message names file, row and column."""


def brief(value: object, characters: int = 200) -> str:
    """Return a value as one line of a message, at most so long."""
    text = " ".join(str(value)[: 4 * characters].split()) or type(value).__name__
    return text if len(text) <= characters else text[: characters - 1] + "…"


def redacted(text: str) -> str:
    """Return a text to print without secrets: a server's answer can hold what it was sent.

    Those are the values of the environment's variables that are named like secrets, and what URLs have of a
    user, a password, a token or a signature.
    """
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:  # a shorter one would be found in plain words
            text = text.replace(value, "***")
    return SIGNED.sub(r"\1***", re.sub(r"(\w+://)[^\s/@]+@", r"\1", text))


def explain(error: BaseException) -> str | None:
    """Explain an error of the surroundings, with the way out; None for any other, which is a bug."""
    for each in chain(error):
        number = each.errno if isinstance(each, OSError) else None
        file = getattr(each, "filename", None)
        if number in FULL or FULL_TEXT.search(str(each)):
            return (
                f"{file or os.getcwd()}: the disk is full ({first_line(each)}); make room (`dvc gc -w` "  # noqa: PTH109
                "removes outputs of other experiments from the cache) and run it again"
            )
        if number in FORBIDDEN and file:
            return f"{file}: {each.strerror}; make it writable, and its folder"  # type: ignore[attr-defined]
        if isinstance(each, MemoryError):
            return (
                "not enough memory; end other programs, or set smaller train.tokens_per_pass or "
                "evaluate.rows_per_batch"
            )
    library = type(error).__module__.split(".")[0]
    if library in STORES or library in NETWORK or isinstance(error, ConnectionError | TimeoutError):
        return explain_store(error, os.environ.get("MLFLOW_TRACKING_URI", "its database"))
    return None


def explain_store(error: BaseException, uri: str) -> str:
    """Explain an error of MLflow, its store or its server, with the way out; never show a password.

    Args:
        uri: the tracking URI in use.
    """
    text = first_line(error).replace(uri, shown(uri))
    # some of MLflow's errors lack the code that they are asked for
    status = error.get_http_status_code() if hasattr(error, "error_code") else 0  # type: ignore[attr-defined]
    if status in (401, 403) or "error code 401" in text:
        return (
            f"MLflow at {shown(uri)} refuses access: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD to a user of that server and its password"
        )
    if isinstance(error, ImportError):
        return (
            f"MLFLOW_TRACKING_URI: {shown(uri)}: its driver is not installed ({text}); install it, name an "
            f"installed one (postgresql+psycopg2://...), {ANOTHER_STORE}"
        )
    if 400 <= status < 500:
        return f"MLflow at {shown(uri)}: {text}"
    return (
        f"MLflow at {shown(uri)} failed ({type(error).__name__}: {text}); look at it, and run this again "
        f"when it responds, {ANOTHER_STORE}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def shown(uri: str) -> str:
    """Return a URI without user name and password."""
    scheme, mark, rest = uri.partition("://")
    return f"{scheme}{mark}{rest.rsplit('@', 1)[-1]}" if mark else uri


def chain(error: BaseException) -> list[BaseException]:
    """Return the error and its causes, down to the first."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) and cause not in found:
        found.append(cause)
    return found
