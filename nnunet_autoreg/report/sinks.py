"""Where metrics also go:

TensorBoard if it is installed, W&B if nnU-Net's own switch is on. Neither can stop or slow a run
much.
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
"""So that W&B waits for nobody and takes no host name, code, packages or printed lines; some
versions know only part of it.
"""


class Sink(Protocol):
    """Takes every metric that ``metrics.jsonl`` takes."""

    def log(self, step: int, name: str, value: float) -> None:
        """Take one value."""

    def close(self) -> None:
        """Hand over what is still held back."""


def open_sinks(folder: Path, name: str, first_step: int) -> list[Sink]:
    """The sinks of this run; what cannot be opened is named in one line and left out.

    Args:
        folder: of the run; events lie in ``tensorboard/`` and ``wandb/`` below it.
        first_step: values of this step and later ones come again.

    Raises:
        UsageError: nnU-Net's switch holds neither 0 nor 1.
    """
    wanted = wandb_enabled()
    opened: list[Sink] = []
    if importlib.util.find_spec("tensorboard") is not None:
        _try(opened, "TensorBoard", lambda: TensorBoard(folder / "tensorboard", first_step))
    if wanted:
        _try(opened, "W&B", lambda: WeightsAndBiases(folder, name, first_step))
    return opened


def wandb_enabled() -> bool:
    """Whether nnU-Net's switch for W&B is on.

    Raises:
        UsageError: it holds anything but 0, 1, True or False.
    """
    value = os.environ.get(SWITCH, "0").lower()
    if value not in ("0", "1", "true", "false"):
        raise UsageError(
            f"{SWITCH}={os.environ[SWITCH]}: nnU-Net knows 0 (off) and 1 (on); type: unset {SWITCH}"
        )
    return value in ("1", "true")


def _try(opened: list[Sink], what: str, make: Any) -> None:
    try:
        opened.append(make())
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "%s could not be started (%s); the run goes on without it, metrics.jsonl has every "
            "value",
            what,
            why,
        )


class Guarded:
    """A sink that is dropped, with one line, at its first failure: a full disk or a lost network
    ends no training.
    """

    what = ""

    def __init__(self) -> None:
        self.works = True

    def log(self, step: int, name: str, value: float) -> None:
        """Take one value."""
        self._guard(lambda: self._log(step, name, value))

    def close(self) -> None:
        """Hand over what is still held back."""
        self._guard(self._close)

    def _guard(self, call: Any) -> None:
        if not self.works:
            return
        try:
            call()
        except Exception as error:
            self.works = False
            log.warning(
                "%s takes no more metrics (%s); the run goes on without it",
                self.what,
                (str(error).splitlines() or ["?"])[0],
            )

    def _log(self, step: int, name: str, value: float) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class TensorBoard(Guarded):
    """Events for ``tensorboard --logdir``; values of steps that run again are purged."""

    what = "TensorBoard"

    def __init__(self, folder: Path, first_step: int):
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)

    def _log(self, step: int, name: str, value: float) -> None:
        self.writer.add_scalar(name, value, step)

    def _close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Guarded):
    """The project and mode that nnU-Net's variables name.

    Metrics are sent and nothing else: no plan, paths or scans.
    """

    what = "W&B"

    def __init__(self, folder: Path, name: str, first_step: int):
        super().__init__()
        wandb = importlib.import_module("wandb")
        mode = os.environ.get(MODE, "online")
        known = getattr(wandb.Settings, "model_fields", None) or vars(wandb.Settings())
        settings = wandb.Settings(**{name: value for name, value in QUIET.items() if name in known})
        self.run: Any = wandb.init(
            project=os.environ.get(PROJECT, "nnunet"),
            dir=str(folder),
            name=name,
            id=_lasting_id(folder),
            resume="allow",
            mode=mode,
            settings=settings,
        )
        self.first_step = max(first_step, int(self.run.step))

    def _log(self, step: int, name: str, value: float) -> None:
        if step >= self.first_step:
            self.run.log({name: value}, step=step)

    def _close(self) -> None:
        self.run.finish()


def _lasting_id(folder: Path) -> str:
    """One random name for all continuations of a run."""
    import secrets

    path = folder / ID_NAME
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
