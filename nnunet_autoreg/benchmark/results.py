"""``runs.jsonl``: one line per finished run, so that a table may grow over days. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_autoreg.benchmark.split import fold_of_split
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.records import parse_json, whole_lines

RESULTS_NAME = "runs.jsonl"
KEYS = ("arm", "encoder", "labels", "seed", "split", "steps", "batch", "recipe")

UNEQUAL_COST = 0.1
"""Pretrainings that differ by more than this share of their FLOPs were not of equal cost."""


@dataclass(frozen=True)
class Cost:
    """The cost of a finished pretraining.

    Attributes:
        flops: multiplications and additions of all steps, forward and backward of encoder, decoder
            and head; None if they could not be counted.
        samples: number of crops that were used.
        seconds: duration of all steps, from the run's metrics; None if there are none.
    """

    flops: float | None
    samples: int
    seconds: float | None


@dataclass(frozen=True)
class RunKey:
    """The properties that identify a run: two runs with an equal key are the same run.

    Attributes:
        arm: "pretrained", "scratch", "stock", or the objective of a twin of the pretraining.
        encoder: name of the weights whose plan it uses; "-" for stock.
        labels: requested number of labelled patients; in folders of older versions, of cases.
        split: "development", "test", or a fold such as "fold1of5".
        recipe: changed values of the fine-tuning recipe as "key=value" words; "" if there are none
            and for stock.
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
        parts = (
            self.encoder,
            self.arm,
            f"{self.labels}labels",
            f"seed{self.seed}",
            self.split,
            f"{self.steps}x{self.batch}",
            self.recipe,
        )
        used = [part for part in parts if part not in ("", "-")]
        return "-".join(re.sub(r"[^\w.]", "_", part) for part in used)

    def __str__(self) -> str:
        text = self.arm
        if self.encoder != "-":
            text += f" ({self.encoder})"
        text += f", {self.labels} labels, seed {self.seed}"

        fold_and_number = fold_of_split(self.split)
        if fold_and_number is not None:
            fold, num_folds = fold_and_number
            text += f", fold {fold + 1} of {num_folds}"
        return text


def key_of(line: Mapping[str, Any]) -> RunKey:
    """Return which run a line belongs to."""
    return RunKey(**{name: line[name] for name in KEYS})


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return all whole lines of the file.

    A last line that a kill cut short is left out, so that its run is repeated.

    Raises:
        AutoregError: a line in the middle is damaged.
    """
    found = []
    for number, text in enumerate(whole_lines(file), start=1):
        try:
            line = parse_json(text)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise AutoregError(
                f"{file}, line {number} does not describe a run ({error!r}); remove that line to "
                "have its run repeated",
                code="benchmark-damaged-line",
            ) from error
        found.append(line)
    return found
