"""Exceptions for user errors."""

import os
import unicodedata

MAX_CHARACTERS = 4000  # of a problem or remedy
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: control, format, surrogate, line, paragraph


class UserError(Exception):
    """An error that the user can fix: `problem` names the file, line, field or flag; `remedy` says what to do.

    The command line prints it as one line and exits with 1; any other exception is a bug. Text from a file can contain
    line breaks, and control characters that a terminal would obey: they are escaped.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = _one_line(problem), _one_line(remedy)
        super().__init__(self.problem, self.remedy)  # both, so that worker processes can pickle it

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class ModelError(UserError):
    """The model itself is faulty: the operator can fix it, an API client cannot."""


def read_remedy(error: Exception, file: str, otherwise: str) -> str:
    """What helps when `file` cannot be read: for missing permission the mode with which this process can read it.

    In the images that is group 0, whatever user the engine or the cluster chooses.
    """
    if not isinstance(error, PermissionError):
        return otherwise
    group = os.getgid()
    return f"make it readable for user {os.getuid()}, group {group}: chgrp {group} {file} && chmod 640 {file}"


def _one_line(text: str) -> str:
    """Without line breaks, invisible characters and half characters, and of limited length."""
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in INVISIBLE else char for char in text)
