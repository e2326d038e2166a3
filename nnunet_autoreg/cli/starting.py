"""End a command with one line if it is stopped while its modules are still imported.

Every command imports this module before any other of the package, because the others take up to
some seconds to import. From the beginning of its work on, ``stopping`` takes over.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_CODE = 130
COMMANDS_FOLDER = Path(__file__).parent

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers

_usual_handlers: dict[signal.Signals, Handler] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
_is_starting = threading.Event()


def command_of(program: str) -> str:
    """Return the name of the command that ``sys.argv[0]`` runs; "" if it runs something else.

    It is an installed program, ``.../bin/autoreg_pretrain``, or a file of this folder that
    ``python -m`` runs.
    """
    path = Path(program)
    if path.name.startswith("autoreg_"):
        return path.name
    if path.suffix == ".py" and path.parent == COMMANDS_FOLDER:
        return f"autoreg_{path.stem}"
    return ""


def begin() -> None:
    """Let SIGTERM and Ctrl-C end this process at once, if it is a command and about to start.

    Nothing was done yet, so that there is nothing to save or to tidy up.
    """
    if not command_of(sys.argv[0]) or parent_process() is not None:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    _is_starting.set()
    for number, usual in _usual_handlers.items():
        # A handler that somebody has chosen is kept, and so is an ignored signal.
        if signal.getsignal(number) is usual:
            signal.signal(number, _end)


def finish() -> None:
    """Have the signals do what they did before ``begin``, because ``stopping`` has taken over.

    It puts back our handler at the end of the command.
    """
    _is_starting.clear()


def _end(number: int, frame: FrameType | None) -> None:
    if not _is_starting.is_set():
        signal.signal(number, _usual_handlers[signal.Signals(number)])
        os.kill(os.getpid(), number)
        return

    cause = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    line = f"{command_of(sys.argv[0])}: {cause} before it began; type the same line again\n"
    # Of the processes that torchrun starts, the main one speaks.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, line.encode())
    # Not by an exception, which the imports that are under way might swallow.
    os._exit(EXIT_CODE)


begin()
