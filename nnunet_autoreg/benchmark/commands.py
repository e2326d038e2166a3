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
        threads: number of threads of torch on a CPU, for each command.
        folders: nnU-Net's folders by the names of their variables; nnUNet_raw is the caller's.
    """

    log_file: Path
    device: str
    threads: int
    folders: Mapping[str, Path] = field(default_factory=dict)

    def environment(self, **changes: object) -> dict[str, str]:
        """Return the caller's environment with the folders and this interpreter's commands."""
        # Idle threads of OpenMP that spin for long slow each other down on shared cores.
        settings: dict[str, object] = {
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            **self.folders,
        }
        if self.device == "cpu":
            settings["OMP_NUM_THREADS"] = self.threads
        # The commands of this interpreter come first, also where its environment is not activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, **settings, **changes}
        return {name: str(value) for name, value in environment.items()}

    def for_training(self, results: Path) -> dict[str, str]:
        """Return the environment of a training that writes to ``results``.

        On a CPU the augmentation runs in the training's own process, so that the seed decides; on a
        GPU, which it would slow down, in nnU-Net's workers.
        """
        alone = {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1} if self.device == "cpu" else {}
        return self.environment(nnUNet_results=results, **alone)

    def run(self, line: Sequence[str], **changes: object) -> None:
        """Run one command.

        Args:
            changes: changes of the environment.

        Raises:
            AutoregError: it is not installed, or it failed; the message has the last line of its
                output.
        """
        log.info("$ %s", shlex.join(line))
        start = time.monotonic()
        environment = self.environment(**changes)
        program = shutil.which(line[0], path=environment["PATH"])
        if program is None:
            raise AutoregError(
                f"the command {line[0]} is not installed; run autoreg_doctor",
                code="command-not-installed",
            )

        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(f"$ {shlex.join(line)}\n")
            handle.flush()
            with phase(f"running {line[0]}"):
                exit_code = run_guarded([program, *line[1:]], environment, handle)

        if exit_code:
            raise AutoregError(
                f"{line[0]} ended with exit code {exit_code} ({last_line(self.log_file)}); all of "
                f"its output is in {self.log_file}",
                code="command-failed",
            )

        log.info("  done in %.0f s", time.monotonic() - start)


def last_line(log_file: Path) -> str:
    """Return the last line of a log that has letters in it."""
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if any(c.isalpha() for c in line)]
    return lines[-1][:300] if lines else "no output"
