"""Errors that users can mend, and how other libraries' errors are quoted."""


class SdftError(Exception):
    """Something the user can put right: names the field or file, its value and the fix.

    The commands print it as one line, without a traceback, and exit with status 2.
    """


class FruitlessError(SdftError):
    """A run has ended without a model, and would again with the same settings."""


def first_line(error: BaseException) -> str:
    """What another library's error says, as far as it fits into one line of ours; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
