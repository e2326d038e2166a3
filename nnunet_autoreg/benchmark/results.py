"""``runs.jsonl``: one line per finished run, appended whole, so that a table may grow over many
sittings.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import AutoregError

RESULTS_NAME = "runs.jsonl"
KEYS = ("arm", "encoder", "labels", "seed", "split", "steps", "batch", "recipe")


@dataclass(frozen=True)
class RunKey:
    """What makes two runs the same run.

    Attributes:
        arm: "pretrained", "masked", "scratch" or "stock".
        encoder: name of the weights whose plan it uses; "-" for stock.
        labels: labelled cases asked for.
        recipe: changed values of the fine-tuning recipe as "key=value" words; "" for stock and
            without any.
    """

    arm: str
    encoder: str
    labels: int
    seed: int
    split: str
    steps: int
    batch: int
    recipe: str = ""

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        words = (
            self.encoder,
            self.arm,
            f"{self.labels}labels",
            f"seed{self.seed}",
            self.split,
            f"{self.steps}x{self.batch}",
            self.recipe,
        )
        return "-".join(
            "".join(c if c.isalnum() or c in "_." else "_" for c in word)
            for word in words
            if word not in ("", "-")
        )

    def __str__(self) -> str:
        on = "" if self.encoder == "-" else f" ({self.encoder})"
        return f"{self.arm}{on}, {self.labels} labels, seed {self.seed}"


def key_of(line: Mapping[str, Any]) -> RunKey:
    """The run that a line is of."""
    return RunKey(**{name: line[name] for name in KEYS})


def read_results(file: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line that a kill cut short is dropped, and its run is repeated.

    Raises:
        AutoregError: a line in the middle is damaged.
    """
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    found = []
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(text)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise AutoregError(
                f"{file}, line {number} is no run ({error!r}); remove that line to have its run "
                "repeated"
            ) from error
        found.append(line)
    return found


def append_result(file: Path, line: Mapping[str, Any]) -> None:
    """Add one line; of what a kill left of an earlier one nothing stays."""
    text = json.dumps(line, allow_nan=False)
    with file.open("ab+") as handle:
        handle.seek(0)
        whole = handle.read().rfind(b"\n") + 1
        handle.truncate(whole)
        handle.seek(whole)
        handle.write(text.encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
