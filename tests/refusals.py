"""Check an error by its class, its code and the values that its message must name.

The sentence of a message may be reworded at any time, so tests do not compare it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nnunet_autoreg.corpus.private import TERMINAL_ONLY
from nnunet_autoreg.errors import AutoregError


@contextmanager
def refused(
    error_class: type[AutoregError],
    code: str,
    *values: object,
) -> Iterator[pytest.ExceptionInfo[AutoregError]]:
    """Expect an error of exactly this code, whose message names all the values."""
    with pytest.raises(error_class) as caught:
        yield caught

    message = str(caught.value)
    assert caught.value.code == code, f"{caught.value.code}: {message}"
    missing = [value for value in values if str(value) not in message]
    assert not missing, f"{missing} are not named in: {message}"


def logged(caplog: pytest.LogCaptureFixture, *values: object) -> bool:
    """Return whether one line of the log, as a terminal shows it, names all the values."""
    for record in caplog.records:
        message = record.getMessage() + getattr(record, TERMINAL_ONLY, "")
        if all(str(value) in message for value in values):
            return True
    return False
