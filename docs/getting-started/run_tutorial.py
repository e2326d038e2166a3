"""Run the commands of tutorial.md and write their outputs into the page.

    python docs/getting-started/run_tutorial.py --dataset nnUNet_raw/Dataset004_Hippocampus

Every block that begins with ```console holds one command after "$ ". The commands run in the order
of the page, in a new folder that holds three things: unlabelled scans in ``scans``, a labelled
nnU-Net dataset, and two scans in ``new_scans`` to be segmented. The lines below each command are
then replaced by what it printed.

A comment before a block chooses the lines that are shown, by regular expressions:

    <!-- show: ^ok | ^next: -->

Lines in between become "...". Without the comment, all lines are shown.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.records import read_json, write_json

PAGE = Path(__file__).with_name("tutorial.md")
DATASET = "Dataset004_Hippocampus"
NUM_UNLABELLED, NUM_LABELLED, NUM_NEW = 16, 6, 2
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

BLOCK = re.compile(
    r"(?P<show><!-- show: (?P<patterns>.*?) -->\n)?"
    r"```console\n\$ (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n(?P<output>.*?)```",
    re.DOTALL,
)
PROGRESS_BAR = re.compile(r"^[^|]*\d+%\|[^|]*\|[^\]]*\]\s*")
SITE_PACKAGES = re.compile(r"\S*/site-packages")
MAX_COLUMNS = 150
"""Longer lines are wrapped."""


@dataclass(frozen=True)
class Workspace:
    """The folder in which the tutorial is run.

    Attributes:
        root: holds the scans, nnU-Net's three folders, and the outputs of finished commands.
    """

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the caller's environment with nnU-Net's folders inside the workspace."""
        folders = {name: str(self.root / name) for name in NNUNET_FOLDERS}
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        settings = {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "GOMP_SPINCOUNT": "1000"}
        return {**os.environ, **folders, **settings, "PATH": programs}

    def prepare(self, dataset: Path) -> None:
        """Copy a few scans of a raw dataset to where the tutorial expects them."""
        description = read_json(dataset / "dataset.json")
        ending = description["file_ending"]
        images = sorted((dataset / "imagesTr").glob(f"*_0000{ending}"))
        num_needed = NUM_UNLABELLED + NUM_LABELLED + NUM_NEW
        if len(images) < num_needed:
            sys.exit(f"{dataset} has {len(images)} images; the tutorial needs {num_needed}")

        unlabelled = images[:NUM_UNLABELLED]
        labelled = images[NUM_UNLABELLED : NUM_UNLABELLED + NUM_LABELLED]
        new = images[NUM_UNLABELLED + NUM_LABELLED : num_needed]

        raw = self.root / "nnUNet_raw" / DATASET
        for name in (*NNUNET_FOLDERS, "scans", "new_scans"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("imagesTr", "labelsTr"):
            (raw / name).mkdir(parents=True, exist_ok=True)

        for image in unlabelled:
            shutil.copy(image, self.root / "scans" / image.name.replace("_0000", ""))
        for image in new:
            shutil.copy(image, self.root / "new_scans")
        for image in labelled:
            label = dataset / "labelsTr" / image.name.replace("_0000", "")
            shutil.copy(image, raw / "imagesTr")
            shutil.copy(label, raw / "labelsTr")
        write_json(raw / "dataset.json", {**description, "numTraining": NUM_LABELLED})

    def run(self, number: int, command: str) -> str:
        """Return what a command prints, from an earlier run of this script if there is one."""
        record = self.root / "outputs" / f"{number:02d}.json"
        if record.exists():
            earlier = read_json(record)
            if earlier["command"] == command:
                return str(earlier["output"])

        print(f"$ {command}", flush=True)
        finished = subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if finished.returncode:
            print(finished.stdout)
            sys.exit(f"the command ended with exit code {finished.returncode}")

        record.parent.mkdir(exist_ok=True)
        write_json(record, {"command": command, "output": finished.stdout})
        return finished.stdout


def clean(output: str, names: Mapping[str, str]) -> list[str]:
    """Return the lines of an output, with paths shortened and progress bars left out.

    Args:
        names: long path -> what is written in its place.
    """
    lines = []
    for line in output.splitlines():
        # A line of the log may follow a progress bar without a line break.
        shortened = PROGRESS_BAR.sub("", line)
        if not shortened and line:
            continue
        for path, short in names.items():
            shortened = shortened.replace(path, short)
        shortened = SITE_PACKAGES.sub("site-packages", shortened)
        lines.append(shortened.rstrip())

    while lines and not lines[-1]:
        lines.pop()
    return lines


def select(lines: list[str], patterns: list[str]) -> list[str]:
    """Return the lines that match a pattern, and "..." for every gap between them."""
    if not patterns:
        return lines

    shown: list[str] = []
    for line in lines:
        is_wanted = any(re.search(pattern, line) for pattern in patterns)
        if is_wanted:
            shown += textwrap.wrap(
                line,
                MAX_COLUMNS,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
        elif not shown or shown[-1] != "...":
            shown.append("...")
    return shown


def patterns_of(block: re.Match[str]) -> list[str]:
    """Return the regular expressions of the comment before a block."""
    written = block["patterns"] or ""
    return [pattern.strip() for pattern in written.split(" | ") if pattern.strip()]


def with_outputs(page: str, outputs: list[str], names: Mapping[str, str]) -> str:
    """Return the page with the outputs of its first commands below these commands."""
    left = iter(outputs)

    def filled(block: re.Match[str]) -> str:
        output = next(left, None)
        if output is None:
            return block[0]
        shown = select(clean(output, names), patterns_of(block))
        body = "".join(f"{line}\n" for line in shown)
        return f"{block['show'] or ''}```console\n$ {block['command']}\n{body}```"

    return BLOCK.sub(filled, page)


def main() -> None:
    """Run the tutorial and rewrite its page."""
    parser = argparse.ArgumentParser(description="Run the commands of the tutorial.")
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="raw nnU-Net dataset of the Hippocampus task, of which a few scans are copied",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder to work in (default: a new temporary one). In a folder that was used before, "
        "commands that have already run are not run again",
    )
    args = parser.parse_args()

    root = args.work or Path(tempfile.mkdtemp(prefix="autoreg_tutorial_"))
    workspace = Workspace(root.resolve())
    workspace.prepare(args.dataset)

    names = {
        str(workspace.root): "~/tutorial",
        sys.prefix: "~/env",
        str(PAGE.parents[2]): "~/nnunet-autoreg",
    }

    page = PAGE.read_text(encoding="utf-8")
    outputs: list[str] = []
    for number, block in enumerate(BLOCK.finditer(page), start=1):
        outputs.append(workspace.run(number, block["command"]))
        # After every command, so that a run that is stopped has written what it has seen.
        PAGE.write_text(with_outputs(page, outputs, names), encoding="utf-8")
    print(f"wrote {PAGE}; everything else is in {workspace.root}")


if __name__ == "__main__":
    main()
