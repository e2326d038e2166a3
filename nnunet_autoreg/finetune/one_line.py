"""Show errors as one line where nnU-Net's commands would show a traceback."""

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
    """Turn errors that are meant for the user into one line on the terminal and exit code 1.

    This is for trainers and planners only, which run inside nnU-Net's commands.
    """
    try:
        yield
    except AutoregError as error:
        raise SystemExit(f"error: {error}") from error


def missing_plans(error: BaseException) -> str | None:
    """Return one line about a plans file that does not exist, or None for any other error."""
    if not isinstance(error, FileNotFoundError) or not str(error.filename).endswith("Plans.json"):
        return None

    file = Path(str(error.filename))
    plan = f"nnUNetv2_plan_and_preprocess -d {dataset_number(file.parent.name)} -pl AutoregPlanner"
    # This is nnU-Net's own default, so the option was probably left out.
    if file.name == "nnUNetPlans.json":
        return (
            f"{file} does not exist; was '-p AutoregPlans' forgotten? Those plans are made by: "
            f"{plan}"
        )
    return f"{file} does not exist; make it with: {plan}"


def explain_errors_of_nnunet() -> None:
    """Show one line from now on if nnU-Net's own code fails because of the user's options.

    nnU-Net opens the plans before it makes the trainer, and loads ``-pretrained_weights`` between
    two calls of the trainer, so our trainers cannot catch these errors.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = missing_plans(error) or misfit(error, trace, sys.argv)
        if message is None:
            previous(kind, error, trace)
        else:
            sys.stderr.write(f"error: {message}\n")

    sys.excepthook = hook
