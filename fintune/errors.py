"""Errors with a message for the user: what is wrong, its value and how to fix it.

UserError           input, parameters or environment; a stage or command prints it and exits with 1
    RecordError     a table: the file, the row and the column
"""


class UserError(Exception):
    """Error in the user's input, parameters or environment; the message includes the fix."""


class RecordError(UserError):
    """Error in a table's format or contents; the message names file, row and column."""


def brief(value: object, characters: int = 200) -> str:
    """Return a value as one line of a message, at most so long."""
    text = " ".join(str(value)[: 4 * characters].split()) or type(value).__name__
    return text if len(text) <= characters else text[: characters - 1] + "…"
