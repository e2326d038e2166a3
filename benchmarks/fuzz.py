"""Thousands of damaged and hostile files of every format that is read, and what came of them.

    python benchmarks/fuzz.py --examples 400

It is the long form of ``tests/unit/test_fuzz.py``. One JSON line for each format goes to
``benchmarks/results/fuzz.jsonl``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from recording import commit_of

from nnunet_autoreg.records import append_json_line

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "fuzz.jsonl"


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--examples", type=int, default=400, help="files for each test")
    args = p.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "record.jsonl"
        settings = {
            "AUTOREG_FUZZ_EXAMPLES": str(args.examples),
            "AUTOREG_FUZZ_RECORD": str(record),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no"]
        done = subprocess.run(
            [*command, str(REPO / "tests/unit/test_fuzz.py")],
            cwd=REPO,
            env={**os.environ, **settings},
            check=False,
        )
        lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]

    about = {"benchmark": "fuzz", "commit": commit_of(REPO), "examples": args.examples}
    for line in lines:
        append_json_line(RESULTS, {**line, **about})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
