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
        # The commands of this interpreter come first, even if its environment is not activated.
        own_commands = Path(sys.executable).parent
        path = f"{own_commands}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, **settings, **changes}
        return {name: str(value) for name, value in environment.items()}

    def for_training(self, results: Path) -> dict[str, str]:
        """Return the environment of a training that writes to ``results``.

        On a CPU the augmentation runs in the training's own process, so that the seed decides. On a
        GPU it would slow the training down there, and nnU-Net's workers do it.
        """
        changes: dict[str, object] = {"nnUNet_results": results}
        if self.device == "cpu":
            changes |= {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1}
        return self.environment(**changes)

    def run(self, line: Sequence[str], **changes: object) -> None:
        """Run one command.

        Args:
            changes: changes of the environment.

        Raises:
            AutoregError: it is not installed, or it failed; the message has the last line of its
                output.
        """
        typed = shlex.join(line)
        log.info("$ %s", typed)
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
            handle.write(f"$ {typed}\n")
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
    last = "no output"
    if not log_file.is_file():
        return last

    text = log_file.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        if any(character.isalpha() for character in line):
            last = line.strip()
    return last[:300]
