"""Errors with a message for the user: what is wrong, its value and how to fix it.

UserError           input, parameters or environment; a stage or command prints it and exits with 1
    RecordError     a table: the file, the row and the column
"""


class UserError(Exception):
    """Error in the user's input, parameters or environment; the message includes the fix."""


class RecordError(UserError):
    """Error in a table's format or contents; the message names file, row and column."""
