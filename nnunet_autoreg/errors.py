"""The exceptions that users see. Messages say what is wrong, which value, where, and what to do.

Commands turn an ``AutoregError`` into one line on stderr and its ``exit_code``; anything else is a
bug and keeps its traceback.
"""

import difflib
import shlex
from collections.abc import Iterable


class AutoregError(Exception):
    """Base of all errors meant for the user.

    Attributes:
        code: a stable name of the fault, such as ``plan-unknown-key``. Programs and tests rely on
            it, because messages may be reworded at any time. Without its own code, an error has the
            code of its class.
    """

    exit_code = 1
    code = "error"

    def __init__(self, message: str = "", code: str = ""):
        super().__init__(message)
        if code:
            self.code = code


class UsageError(AutoregError):
    """The command line, the environment or a setting is wrong; nothing was started."""

    exit_code = 2
    code = "usage"


class ScanError(AutoregError):
    """One scan cannot be used. The run continues without it and counts it.

    Attributes:
        status: one word for the ``status`` column of ``scans.csv``, e.g. ``unreadable``.
    """

    def __init__(self, status: str, reason: str):
        super().__init__(reason, f"scan-{status}")
        self.status = status


class PlanError(UsageError):
    """A plan, or a value set in it, cannot be carried out."""

    code = "plan"


class StoreError(AutoregError):
    """A preprocessed case cannot be written or read."""

    code = "store"


class CheckpointError(AutoregError):
    """A checkpoint cannot be written, read or continued."""

    code = "checkpoint"


class WeightsError(AutoregError):
    """Pretrained weights are missing, damaged, or do not fit the network."""

    code = "weights"


class ObjectsError(AutoregError):
    """Objects to detect, or detections, are missing, damaged or contradict the image they belong
    to.
    """

    code = "objects"


class ClassesError(AutoregError):
    """Classes of scans are missing, damaged, or contradict the scans they belong to."""

    code = "classes"


class LostProcessError(AutoregError):
    """Another process of the training is gone.

    A launcher then ends the others too, by SIGTERM. The user has to see the loss, not that signal.
    """

    code = "lost-process"


class InterruptedRunError(KeyboardInterrupt):
    """The user or the cluster stopped the command; finished work is kept.

    No ``Exception``, as Python's own KeyboardInterrupt: code that continues after any error, such
    as torch's compiler, must not take this for one.
    """

    exit_code = 130


def printable(text: str) -> str:
    """Return ``text`` with control characters and bytes that are not valid text as escapes.

    Names of files and words in other people's files may hold any of them, and a terminal obeys
    them. Line breaks are control characters, too.
    """
    if text.isprintable():
        return text
    characters = []
    for character in text:
        if character.isprintable():
            characters.append(character)
        else:
            escaped = character.encode("unicode_escape").decode("ascii")
            characters.append(escaped)
    return "".join(characters)


def shell_quoted(text: str) -> str:
    """Return ``text`` as one word for the shell, which is printed to be typed.

    Control characters and bytes that are not valid text cannot be printed as they are. The shell
    reads their octal numbers within $'...'.
    """
    if text.isprintable():
        return shlex.quote(text)
    parts = []
    for character in text:
        if character.isprintable() and character not in "\\'":
            parts.append(character)
        else:
            # A byte that is not text is a surrogate from U+DC80 to U+DCFF.
            is_byte = "\udc80" <= character <= "\udcff"
            encoded = character.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
            parts += [f"\\{byte:03o}" for byte in encoded]
    return f"$'{''.join(parts)}'"


MAX_COMPARED = 100


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown ``name``: a close match if there is one, else
    all that is known.
    """
    names = sorted(known)
    # Comparing takes time that grows with the square of the length.
    close = difflib.get_close_matches(name[:MAX_COMPARED], names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are: {', '.join(names)}"
