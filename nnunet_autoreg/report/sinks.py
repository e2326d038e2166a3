"""Copies of the metrics for TensorBoard and W&B.

TensorBoard is used if it is installed, W&B if nnU-Net's own switch is on. Neither can end a run, or
slow it down much.
"""

import importlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from nnunet_autoreg.errors import UsageError

log = logging.getLogger(__name__)

SWITCH, PROJECT, MODE = "nnUNet_wandb_enabled", "nnUNet_wandb_project", "nnUNet_wandb_mode"
SECONDS_TO_WAIT = 30
ID_NAME = ".wandb_id"
QUIET: dict[str, Any] = {
    "init_timeout": SECONDS_TO_WAIT,
    "login_timeout": SECONDS_TO_WAIT,
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""W&B must not wait for an answer, and must not collect host name, code, packages or printed lines.

Some versions of W&B know only a part of these settings.
"""


class Sink(Protocol):
    """Takes every metric that ``metrics.jsonl`` takes."""

    def log(self, step: int, name: str, value: float) -> None:
        """Take one value."""

    def close(self) -> None:
        """Write the values that are still buffered."""


def open_sinks(folder: Path, name: str, first_step: int) -> list[Sink]:
    """Open the sinks of this run. If one cannot be opened, a warning is logged.

    Args:
        folder: the run's folder; events are written to ``tensorboard/`` and ``wandb/`` below it.
        first_step: values of this step and later ones will be logged again.

    Raises:
        UsageError: nnU-Net's switch is neither 0 nor 1.
    """
    # A wrong switch is refused before anything is opened.
    is_wandb_wanted = wandb_enabled()

    opened: list[Sink] = []
    if importlib.util.find_spec("tensorboard") is not None:
        _try(opened, "TensorBoard", lambda: TensorBoard(folder / "tensorboard", first_step))
    if is_wandb_wanted:
        _try(opened, "W&B", lambda: WeightsAndBiases(folder, name, first_step))
    return opened


def wandb_enabled() -> bool:
    """Return whether nnU-Net's switch for W&B is on.

    Raises:
        UsageError: the switch is not 0, 1, True or False.
    """
    value = os.environ.get(SWITCH, "0").lower()
    if value not in ("0", "1", "true", "false"):
        raise UsageError(
            f"{SWITCH}={os.environ[SWITCH]} is not known to nnU-Net, which knows 0 (off) and 1 "
            f"(on); type: unset {SWITCH}",
            code="wandb-switch",
        )
    return value in ("1", "true")


def _try(opened: list[Sink], name: str, make: Any) -> None:
    try:
        opened.append(make())
    except Exception as error:
        log.warning(
            "%s could not be started (%s); the run continues without it, metrics.jsonl has every "
            "value",
            name,
            _first_line(error),
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class Guarded:
    """A sink that is dropped at its first failure, with one line in the log.

    A full disk or a lost network must not end a training.
    """

    title = ""

    def __init__(self) -> None:
        self.works = True

    def log(self, step: int, name: str, value: float) -> None:
        """Take one value."""
        self._guard(lambda: self._log(step, name, value))

    def close(self) -> None:
        """Write the values that are still buffered."""
        self._guard(self._close)

    def _guard(self, call: Any) -> None:
        if not self.works:
            return
        try:
            call()
        except Exception as error:
            self.works = False
            log.warning(
                "%s does not accept metrics any more (%s); the run continues without it",
                self.title,
                _first_line(error),
            )

    def _log(self, step: int, name: str, value: float) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class TensorBoard(Guarded):
    """Writes events for ``tensorboard --logdir``; values of steps that run again are purged."""

    title = "TensorBoard"

    def __init__(self, folder: Path, first_step: int):
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)

    def _log(self, step: int, name: str, value: float) -> None:
        self.writer.add_scalar(name, value, step)

    def _close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Guarded):
    """Send metrics to W&B, in the project and mode of nnU-Net's variables.

    Only metrics are sent: no plan, paths or scans.
    """

    title = "W&B"

    def __init__(self, folder: Path, name: str, first_step: int):
        super().__init__()
        wandb = importlib.import_module("wandb")
        known = getattr(wandb.Settings, "model_fields", None) or vars(wandb.Settings())
        quiet = {setting: value for setting, value in QUIET.items() if setting in known}
        self.run: Any = wandb.init(
            project=os.environ.get(PROJECT, "nnunet"),
            dir=str(folder),
            name=name,
            id=_lasting_id(folder),
            resume="allow",
            mode=os.environ.get(MODE, "online"),
            settings=wandb.Settings(**quiet),
        )
        # W&B refuses steps before the last one that it has seen.
        self.first_step = max(first_step, int(self.run.step))

    def _log(self, step: int, name: str, value: float) -> None:
        if step >= self.first_step:
            self.run.log({name: value}, step=step)

    def _close(self) -> None:
        self.run.finish()


def _lasting_id(folder: Path) -> str:
    """Return one random id for all continuations of a run."""
    import secrets

    path = folder / ID_NAME
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
