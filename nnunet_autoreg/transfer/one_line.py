"""How an error meant for the user leaves through nnU-Net's commands, which would bury it under a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from nnunet_autoreg.errors import AutoregError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors meant for the user into one line on the terminal and exit code 1. For trainers and planners only."""
    try:
        yield
    except AutoregError as error:
        raise SystemExit(f"error: {error}") from error
