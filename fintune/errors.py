"""Errors with a message for the user: the thing at fault, its value and the way out.

UserError           input, parameters or surroundings; a stage or command prints it and exits with 1
    RecordError     a table: the file, the row and the column
"""


class UserError(Exception):
    """The user's input, parameters or surroundings are at fault; the message names the way out."""


class RecordError(UserError):
    """A table cannot be read or breaks its contract; the message names file, row and column."""
