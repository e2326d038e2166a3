"""Support nnU-Net's own option ``-pretrained_weights FILE``.

Weights that the user names there are never overwritten by the plan's weights.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from nnunet_autoreg.errors import UsageError

OPTION = "-pretrained_weights"
COMMANDS = ("nnUNetv2_train", "run_training")
LOADER = "load_pretrained_weights"
"""The function of nnU-Net that loads the weights of this option."""


def named_weights(command_line: Sequence[str]) -> Path | None:
    """Return the file of ``nnUNetv2_train -pretrained_weights``, or None without this option.

    Args:
        command_line: the command and its arguments, as in ``sys.argv``.

    Raises:
        UsageError: the file does not exist (code "usage-no-file"), or is not a checkpoint of
            nnU-Net (code "usage-not-a-checkpoint").
    """
    if Path(command_line[0]).stem not in COMMANDS:
        return None

    # nnU-Net has parsed its command line already, but keeps this option to itself.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(OPTION, dest="file")
    # Without this option, argparse would take "-p" as an abbreviation of the other.
    parser.add_argument("-p", dest="plans")
    named, _ = parser.parse_known_args(list(command_line[1:]))
    if named.file is None:
        return None

    file = Path(named.file)
    if not file.is_file():
        raise UsageError(f"{OPTION} {file}: this file does not exist", code="usage-no-file")
    if file.suffix == ".safetensors":
        raise UsageError(
            f"{OPTION} {file}: with this option nnU-Net reads its own checkpoints only. The plan "
            f"names the pretrained encoder, which is loaded without it: leave {OPTION} out",
            code="usage-not-a-checkpoint",
        )
    return file


def watch_loading(network: nn.Module) -> Callable[[], bool]:
    """Return a function that returns whether weights have been loaded into ``network`` since this
    call."""
    loaded: list[bool] = []

    # A plain function, because a copy of a network has copies of its hooks.
    def note(module: nn.Module, incompatible_keys: Any) -> None:
        loaded.append(True)

    network.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]
    return lambda: bool(loaded)


def kept_line(file: Path | None, planned: str | None) -> str:
    """Return the log line about the weights that a training starts from.

    Args:
        file: value of ``-pretrained_weights``; None if a script loaded the weights.
        planned: the name of the plan's weights; None for the scratch twin.
    """
    named = f"{OPTION} {file}" if file else "weights that were loaded before training"
    if planned is None:
        return f"starts from {named}: this is not a training from scratch"
    return f"starts from {named}: they are kept, and the plan's weights '{planned}' are not loaded"


def misfit(
    error: BaseException,
    trace: TracebackType | None,
    command_line: Sequence[str],
) -> str | None:
    """Return one line about weights of the user that nnU-Net cannot load; None for other errors."""
    # Any error may come from anywhere: only those out of nnU-Net's own loading are explained.
    functions = []
    while trace is not None:
        functions.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next

    if LOADER not in functions:
        return None

    # The rest of nnU-Net's message lists the values of a whole tensor.
    reason = str(error).split(". ")[0].splitlines() or [type(error).__name__]
    try:
        file = named_weights(command_line)
    except UsageError:
        file = None

    return (
        f"{OPTION} {file or ''}: these weights cannot be loaded into the plan's network "
        f"({reason[0][:160]}); give a checkpoint of the same network, or leave {OPTION} out"
    )
