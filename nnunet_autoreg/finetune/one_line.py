"""How an error meant for the user leaves through nnU-Net's commands, which would bury it under a
traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.finetune.user_weights import misfit
from nnunet_autoreg.nnunet_api import dataset_number


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors meant for the user into one line on the terminal and exit code 1.

    For trainers and planners only.
    """
    try:
        yield
    except AutoregError as error:
        raise SystemExit(f"error: {error}") from error


def missing_plans(error: BaseException) -> str | None:
    """One line about a plans file that nnU-Net did not find while it looked for our trainer's; None
    for any other error.
    """
    if not isinstance(error, FileNotFoundError) or not str(error.filename).endswith("Plans.json"):
        return None
    file = Path(str(error.filename))
    plan = f"nnUNetv2_plan_and_preprocess -d {dataset_number(file.parent.name)} -pl AutoregPlanner"
    if file.name == "nnUNetPlans.json":
        return (
            f"{file} does not exist; was '-p AutoregPlans' forgotten? Those plans are made by: "
            f"{plan}"
        )
    return f"{file} does not exist; make it with: {plan}"


def explain_errors_of_nnunet() -> None:
    """From now on, end in one line where nnU-Net's own code fails because of what the user typed.

    nnU-Net opens the plans before it asks the trainer, and loads ``-pretrained_weights`` between
    two of its calls.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = missing_plans(error) or misfit(error, trace, sys.argv)
        if message is None:
            previous(kind, error, trace)
        else:
            sys.stderr.write(f"error: {message}\n")

    sys.excepthook = hook
