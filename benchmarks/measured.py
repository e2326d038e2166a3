"""Write the tables of ``docs/explanation/measured.md`` from the files in ``benchmarks/results``.

    python benchmarks/measured.py            # rewrite the page
    python benchmarks/measured.py --check    # exit with 1 if the page differs

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. The text around the tables is
written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detection import table as detection_table
from evidence_table import markdown
from evidence_table import table as evidence_table

from nnunet_autoreg.benchmark.table import markdown as benchmark_table

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "explanation" / "measured.md"
TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Line = dict[str, Any]


def lines_of(name: str) -> list[Line]:
    """Return the lines of a file of results."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evidence() -> str:
    """Return what the evidence harness measured."""
    # The titles of its tables stand one level deeper in the page.
    found = evidence_table(lines_of("evidence.jsonl"), None, None, 0.02)
    return found.replace("## ", "### ")


def few_label() -> str:
    """Return the first short trainings: mean Dice by split, labels and configuration."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for line in lines_of("few_label.jsonl"):
        key = (line["split"], line["steps"], line["labels"], line["arm"], line["configuration"])
        groups.setdefault(key, []).append(line["dice"])

    rows = []
    for key, dice in sorted(groups.items(), key=str):
        spread = f"{np.std(dice, ddof=1):.3f}" if len(dice) > 1 else "-"
        rows.append([*key, len(dice), f"{np.mean(dice):.3f}", spread])
    header = ["split", "steps", "labels", "arm", "configuration", "runs", "Dice", "sd over runs"]
    return markdown(header, rows)


def encoders() -> str:
    """Return the comparison of the two tiny encoders by ``autoreg_benchmark``."""
    return benchmark_table(lines_of("encoders.jsonl")).strip()


def detection() -> str:
    """Return the trainings of the detection benchmark."""
    return "\n".join(detection_table(RESULTS / "detection.jsonl"))


def steps() -> str:
    """Return the seconds of a training step, ours and the baseline's."""
    rows = []
    for line in lines_of("step.jsonl"):
        median = line["median_s"]
        seconds = [f"{median[arm]:.2f}" for arm in ("ours", "baseline", "baseline again")]
        ratios = [f"{line[key]:.2f}" for key in ("ours_over_baseline", BASELINE_NOISE)]
        rows.append([line["what"], line["edge"], line["commit"], *seconds, *ratios])
    header = ["step", "edge of the crop", "commit", "ours, s", "baseline, s", "baseline again, s"]
    return markdown([*header, "ours / baseline", "noise: again / baseline"], rows)


BASELINE_NOISE = "baseline_again_over_baseline"


def crops() -> str:
    """Return how many crops a second one core reads from the store."""
    rows = []
    for line in lines_of("store.jsonl"):
        if line["what"] != "crops":
            continue
        speed = line["crops_per_s_and_core"]
        size = " x ".join(str(n) for n in line["crop_vox"])
        values = [speed[arm] for arm in ("ours", "ours, first touch", "baseline", "baseline again")]
        rows.append([line["set"], size, *values])
    header = ["set", "crop", "ours", "ours, first touch", "nnU-Net's way", "the same again"]
    return markdown(header, rows)


def kills() -> str:
    """Return the runs that were killed at random moments and finished by the same line."""
    rows = []
    for line in lines_of("kills.jsonl"):
        counts = [line["num_kills"], line["num_finished"], line["num_identical"]]
        rows.append([line["command"], *counts])
    return markdown(["command", "kills", "runs finished", "of them equal to the last bit"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "evidence": evidence,
    "few-label": few_label,
    "encoders": encoders,
    "detection": detection,
    "steps": steps,
    "crops": crops,
    "kills": kills,
}


def filled(page: str) -> str:
    """Return the page with every table made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def main() -> int:
    """Rewrite the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare the page, write nothing")
    args = parser.parse_args()

    page = PAGE.read_text(encoding="utf-8")
    made = filled(page)
    if args.check:
        if made != page:
            print(f"{PAGE} is not what its results say; run: python benchmarks/measured.py")
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
