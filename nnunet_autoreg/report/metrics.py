"""``metrics.jsonl``: one JSON line per value, with its step, name and unit."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.records import parse_json, write_text
from nnunet_autoreg.report.sinks import Sink

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends metrics to a file, and hands them to other sinks.

    Args:
        path: the file.
        first_step: lines of this step and later ones are dropped, because a run that continues
            does these steps again.
        sinks: further outputs for every value.
    """

    def __init__(self, path: Path, first_step: int, sinks: Sequence[Sink] = ()):
        self.path, self.sinks = path, sinks
        kept = [_line(line) for line in read_lines(path) if line["step"] < first_step]
        write_text(path, "".join(kept))

    def log(self, step: int, name: str, value: float, unit: str) -> None:
        """Append one value."""
        self._append(step, name, value, unit)
        for sink in self.sinks:
            sink.log(step, name, value)

    def note(self, step: int, name: str, text: str) -> None:
        """Append a sentence, with the unit "text".

        Sinks do not get it: they take numbers only.
        """
        self._append(step, name, text, "text")

    def close(self) -> None:
        """Make the sinks write the values that are still buffered."""
        for sink in self.sinks:
            sink.close()

    def _append(self, step: int, name: str, value: float | str, unit: str) -> None:
        line = _line({"step": step, "name": name, "value": value, "unit": unit})
        # Opened for every value, so that a process that is killed loses one line at most.
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(line)


class NoMetrics(MetricsFile):
    """Ignores metrics. All processes except the main one have it."""

    def __init__(self, path: Path):
        self.path, self.sinks = path, ()

    def _append(self, step: int, name: str, value: float | str, unit: str) -> None:
        pass


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of the file; none if there is no file.

    The last line may be cut off because the process was killed while it wrote. It is left out.
    Other damaged lines are left out with a warning.
    """
    if not path.is_file():
        return []

    found = []
    whole_lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(whole_lines, start=1):
        try:
            record = parse_json(line)
            found.append({key: record[key] for key in ("step", "name", "value", "unit")})
        except (ValueError, KeyError, TypeError):
            log.warning("%s: line %d is damaged and is left out", path, number)

    return found
