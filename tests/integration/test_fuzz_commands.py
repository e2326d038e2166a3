"""A sample of damaged files of a run, given to the command as a user would: it continues, or ends
with one line.
"""

import json
import os

import pytest
from fuzzing import csv_bytes, json_bytes
from hypothesis import HealthCheck, given, settings

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# More examples take half a minute each.
NUM_EXAMPLES = int(os.environ.get("AUTOREG_FUZZ_COMMANDS", "2"))
FILES = ("plan.json", "encoder.json", "scans.csv", "paths_do_not_share.csv")


def damaged_versions(file):
    """Damaged contents of a file of a run."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json_bytes(json.loads(text))
    return csv_bytes([line.split(",") for line in text.splitlines()])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_ends_the_command_in_one_line(home, base, name):
    file = base / name

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_versions(file))
    def typed_again(content):
        file.write_bytes(content)

        done = home.pretrain("base")

        assert done.returncode in (0, 1, 2), done.stderr[-2000:]
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(("autoreg_pretrain: ", "error: ")), done.stderr[-2000:]

    typed_again()
