"""Commands as a user would type them, in nnU-Net's folders of a benchmark."""

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_autoreg.children import run_guarded
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.phases import phase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commands:
    """Runs commands, which end with this process.

    Attributes:
        log_file: takes all of their output.
        device: cpu, cuda or mps.
        threads: of torch on a CPU, for each command.
        folders: nnU-Net's folders by the names of their variables; nnUNet_raw is the caller's.
    """

    log_file: Path
    device: str
    threads: int
    folders: Mapping[str, Path] = field(default_factory=dict)

    def environment(self, **changes: object) -> dict[str, str]:
        """The caller's environment with the folders, and this interpreter's commands first."""
        settings: dict[str, object] = {
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            **self.folders,
        }
        if self.device == "cpu":
            settings["OMP_NUM_THREADS"] = self.threads
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        wanted = {**os.environ, "PATH": path, **settings, **changes}
        return {name: str(value) for name, value in wanted.items()}

    def for_training(self, results: Path) -> dict[str, str]:
        """The environment of a training that writes to ``results``.

        On a CPU the augmentation runs in the training's own process, so that the seed decides; on a
        GPU, which it would slow down, in nnU-Net's workers.
        """
        alone = {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1} if self.device == "cpu" else {}
        return self.environment(nnUNet_results=results, **alone)

    def run(self, line: Sequence[str], **changes: object) -> None:
        """Run one command.

        Args:
            changes: of the environment.

        Raises:
            AutoregError: it is not installed, or failed; its last words are in the message.
        """
        log.info("$ %s", shlex.join(line))
        start, environment = time.monotonic(), self.environment(**changes)
        program = shutil.which(line[0], path=environment["PATH"])
        if program is None:
            raise AutoregError(f"the command {line[0]} is not installed; run autoreg_doctor")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a", encoding="utf-8") as handle:
            handle.write(f"$ {shlex.join(line)}\n")
            handle.flush()
            with phase(f"running {line[0]}"):
                code = run_guarded([program, *line[1:]], environment, handle)
        if code:
            raise AutoregError(
                f"{line[0]} ended with exit code {code} ({last_words(self.log_file)}); all of its "
                "output is in "
                f"{self.log_file}"
            )
        log.info("  done in %.0f s", time.monotonic() - start)


def last_words(log_file: Path) -> str:
    """The last line with words of a log."""
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if any(c.isalpha() for c in line)]
    return lines[-1][:300] if lines else "it said nothing"
