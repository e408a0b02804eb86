"""MLflow's SQLite file: made whole or not at all, checked before any work, and at home after a move."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.request import url2pathname

from fintune import paths
from fintune.errors import UserError

log = logging.getLogger("fintune")

WAYS_OUT = {  # by SQLite's name of the error
    "SQLITE_READONLY": "make the file and its folder writable",
    "SQLITE_CANTOPEN": "make the file and its folder writable",
    "SQLITE_PERM": "make the file and its folder writable",
    "SQLITE_FULL": "make room on its disk",
    "SQLITE_IOERR": "look whether its disk is full or broken",
    "SQLITE_BUSY": "another process holds it; wait for that process, or end it",
}
BROKEN = (
    "move the file away; a new one is made, and `python -m fintune restore` logs the results in this "
    "folder to it"
)
ARTIFACTS = (  # columns that hold the addresses of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)


def sqlite_uri(file: Path) -> str:
    """Return SQLAlchemy's URI of an SQLite file.

    SQLAlchemy ends the path at "?" and decodes "%". A folder's name with one of them is avoided by a path
    from the working directory, the project's root.

    Raises:
        UserError: one of them is in that path, too.
    """
    path = str(file)
    if any(sign in path for sign in "?%"):
        path = os.path.relpath(file)
    if any(sign in path for sign in "?%"):
        raise UserError(f"{path}: a database's path cannot contain ? or %; rename it")
    return f"sqlite:///{path}"


def prepare_database(file: Path, artifacts: Path) -> None:
    """Create MLflow's database if it is missing or only half made, and check that it can be written.

    If it is the project's own and the project was moved or copied, the addresses in it are mended.

    Args:
        file: an SQLite file.
        artifacts: the folder for artifacts of a new database.

    Raises:
        UserError: the file is broken or cannot be written; its folder does not exist.
    """
    if not file.parent.is_dir():
        raise UserError(
            f"MLFLOW_TRACKING_URI: {file}: there is no folder {file.parent}; create it, or unset the "
            f"variable to log to {paths.MLFLOW_DATABASE} in this folder"
        )
    try:
        if file.is_file() and file.stat().st_size and _is_half_made(file):
            log.warning("%s was only half made, by a process that was killed; made again", file)
            file.unlink()
        if not file.is_file() or not file.stat().st_size:
            _create(file, artifacts)
        _check(file)
        if file.parent == artifacts.parent:
            _follow_move(file, artifacts)
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        way_out = next((text for start, text in WAYS_OUT.items() if name.startswith(start)), BROKEN)
        raise UserError(f"{file}: {error}; {way_out}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {WAYS_OUT['SQLITE_PERM']}") from None


def _create(file: Path, artifacts: Path) -> None:
    """Create the database beside its place, and move it there: its migrations take a second."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in file.parent.glob(f".{file.name}.partial*"):  # with its journal
        left.unlink()
    partial = file.with_name(f".{file.name}.partial")
    partial.touch()  # says in words that the folder cannot be written
    store = SqlAlchemyStore(sqlite_uri(partial), artifacts.as_uri())
    store._dispose_engine()
    partial.replace(file)


def _is_half_made(file: Path) -> bool:
    """Return whether the tables are MLflow's but not all there: its first experiment comes last."""
    with closing(sqlite3.connect(file, timeout=30)) as database:
        listed = database.execute("select name from sqlite_master where type = 'table'")
        tables = {name for (name,) in listed}
        if not tables & {"alembic_version", "experiments", "runs"}:
            return False
        used = "experiments" in tables and database.execute("select 1 from experiments").fetchone()
        return not used


def _check(file: Path) -> None:
    """Read all of the database, and begin to write to it."""
    with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as database:
        (found,) = database.execute("pragma quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        database.execute("begin immediate")
        database.execute("create table can_be_written (x)")
        database.execute("rollback")


def _follow_move(file: Path, artifacts: Path) -> None:
    """Let the addresses of artifacts name this folder where they name the one that it was in before."""
    here = artifacts.as_uri()
    with closing(sqlite3.connect(file, timeout=30)) as database, database:
        found = database.execute("select artifact_location from experiments").fetchall()
        locations = {str(location).removesuffix("/0") for (location,) in found}
        for former in sorted(locations - {here}):
            folder = Path(url2pathname(former.removeprefix("file://")))
            if not former.startswith("file://") or folder.name != artifacts.name:
                continue
            for table, column in ARTIFACTS:
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (here, len(former) + 1, former, len(former) + 1, f"{former}/"),
                )
            log.warning("%s was in %s before; its artifacts are in %s now", file.name, folder, here)
