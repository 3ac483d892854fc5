"""Errors that users can put right, and how errors of other libraries are quoted."""


class SdftError(Exception):
    """Something that the user can put right: the message names the setting or the file, its value and the fix.

    The commands print the message as one line, without a traceback, and exit with status 2.
    """


class FruitlessError(SdftError):
    """A run has ended without a model, and would end so again with the same settings."""


def first_line(error: BaseException) -> str:
    """The first line of the message of an error of another library; if the message is empty, the type of the error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
