"""Damaged and hostile inputs for property-based tests, and a watch over what reading them does.

``AUTOREG_FUZZ_EXAMPLES=N`` tries N inputs per format instead of a few, and
``AUTOREG_FUZZ_RECORD=FILE`` appends one JSON line of figures per format.
"""

import copy
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nnunet_autoreg.errors import AutoregError

DEFAULT_EXAMPLES = 15
EXAMPLES = int(os.environ.get("AUTOREG_FUZZ_EXAMPLES", "0")) or DEFAULT_EXAMPLES
IS_SHORT = EXAMPLES == DEFAULT_EXAMPLES
SECONDS_TO_HANG = 60
MAX_GROWTH_BYTES = 2 * 2**30
"""Address space that reading one file may take beside what the process has already."""

few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=IS_SHORT,
    database=None,
    suppress_health_check=list(HealthCheck),
)

RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
PICKLE_IMPORT = "pickle.find_class"
_armed: list["Watch"] = []


def _audit(event: str, _arguments: tuple[Any, ...]) -> None:
    """Count what a hostile file could make Python do while it is read."""
    if _armed and (event in RUNS_CODE or event == PICKLE_IMPORT):
        _armed[-1].code_executed += 1


# Audit hooks cannot be removed, so this one counts only while a watch is armed.
sys.addaudithook(_audit)


@dataclass
class Watch:
    """Figures of one format.

    Attributes:
        format: what was read.
        trap: a hostile pickle would make this folder.
        outcomes: how many inputs were read, and how many refused with which code.
        faults: where other exceptions came from, and the first of each place.
    """

    format: str
    trap: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    tracebacks: int = 0
    code_executed: int = 0
    peak_mib: int = 0
    slowest_s: float = 0.0

    def try_out(self, read: Callable[[], object]) -> object | None:
        """Read one input: it gives a valid result or one line with a code, and nothing else."""
        # Processor time, which does not depend on what else the machine does.
        started = time.process_time()
        _armed.append(self)
        try:
            with bounded_memory(), no_hang():
                result = read()
            self.outcomes["read"] += 1
            return result
        except AutoregError as error:
            assert error.code and str(error).strip(), "an error without code or message"
            self.outcomes[error.code] += 1
            return None
        except Exception as error:
            self.tracebacks += 1
            if IS_SHORT:
                raise
            # The long form collects all faults instead of reducing the first one.
            self.faults.setdefault(_location_of(error), repr(error)[:200])
            return None
        finally:
            _armed.pop()
            self.slowest_s = max(self.slowest_s, time.process_time() - started)
            assert not self.trap.exists(), "code of the file was executed"
            assert not self.code_executed, "the file made Python run something"

    def record(self) -> None:
        """Append the figures to the file that the environment names."""
        file = os.environ.get("AUTOREG_FUZZ_RECORD")
        if not file:
            return
        figures = {
            "format": self.format,
            "tried": sum(self.outcomes.values()) + self.tracebacks,
            "read": self.outcomes["read"],
            "refused": sum(n for code, n in self.outcomes.items() if code != "read"),
            "codes": len(self.outcomes) - ("read" in self.outcomes),
            "tracebacks": self.tracebacks,
            "code_executed": self.code_executed,
            "peak_mib": self.peak_mib,
            "slowest_cpu_s": round(self.slowest_s, 2),
        }
        with Path(file).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(figures) + "\n")


@contextmanager
def watching(name: str, folder: Path) -> Iterator[Watch]:
    """Watch all inputs of one format, and record the figures."""
    watch = Watch(name, folder / "trap")
    before = _reset_peak()
    try:
        yield watch
    finally:
        watch.peak_mib = max(0, _peak_mib() - before)
        watch.record()
    assert not watch.faults, "\n".join(f"{at}: {what}" for at, what in watch.faults.items())


def _location_of(error: Exception) -> str:
    """Return the innermost line of ours that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "nnunet_autoreg" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _reset_peak() -> int:
    """Reset the peak of resident memory, and return what is resident now, in MiB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_mib()


def _peak_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextmanager
def bounded_memory(growth: int = MAX_GROWTH_BYTES) -> Iterator[None]:
    """Let the process take no more than ``growth`` bytes of further address space."""
    # The limit holds for all address space, so it is set above what the process has now.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + growth, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def no_hang(seconds: int = SECONDS_TO_HANG) -> Iterator[None]:
    """Raise ``TimeoutError`` in a block that does not end."""

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not read within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Values in place of others that are expected. Python reads NaN, Infinity and long numbers in JSON.
NUMBERS = (0, 1, -1, 3, 255, 2**31, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e300)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "(deep)",
    " ",
    "0",
    "-1",
    "nan",
    "1e400",
    "9" * 5000,
    "None",
    "../../etc/passwd",
    "/dev/zero",
    "$HOME/${x",
    "=cmd|' /C calc'!A0",
    "-",
    "@",
    "'",
    '"',
    "a,b;c\td",
    "a\nb\rc",
    "\x00",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "ä\u0301",
    "1x2x3",
    "0x0x0",
    "1.0x1.0",
    "nanxnanxnan",
    "os.system",
    "torch.nn.Linear",
)
texts = st.sampled_from(TEXTS) | st.text(max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(NOT_FINITE)
    | st.integers()
    | st.floats()
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

Key = tuple[str | int, ...]


def keys_of(value: Any, above: Key = ()) -> Iterator[Key]:
    """Yield the keys of all nested objects and lists, and () for the whole."""
    yield above
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield from keys_of(inner, (*above, key))


@st.composite
def edited(draw: st.DrawFn, whole: Any) -> Any:
    """Return a JSON value in which some values were replaced, removed, added or doubled."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(list(keys_of(data))))
        if not key:
            # The whole document is seldom replaced, since little is learnt from it.
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        holder = data
        for part in key[:-1]:
            holder = holder[part]
        change = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "nest")))
        if change == "remove":
            del holder[key[-1]]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(texts)] = draw(values)
        elif change == "nest":
            holder[key[-1]] = [copy.deepcopy(holder[key[-1]])] * draw(st.integers(1, 4))
        else:
            holder[key[-1]] = draw(values)
    return data


def to_bytes(data: Any) -> bytes:
    """Return JSON as bytes, lone surrogates included."""
    # Lone surrogates cannot be encoded in the usual way.
    text = json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
    # The marker becomes 900 levels of lists, which json.dumps need not recurse through.
    return text.replace(b'"(deep)"', b"[" * 900 + b"]" * 900)


# Many levels without an end, as lists and as objects, and 500 with one.
DEEP = (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
    """Return bytes in which some were flipped, removed, doubled, cut off or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # Everything may have been cut off.
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        span = draw(st.integers(1, 64))
        change = draw(st.sampled_from(("flip", "cut", "remove", "double", "insert", "zero")))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:]
        elif change == "remove":
            del data[at : at + span]
        elif change == "double":
            data[at:at] = data[at : at + span]
        elif change == "zero":
            data[at : at + span] = bytes(len(data[at : at + span]))
        else:
            known = st.sampled_from(pieces) if pieces else st.nothing()
            data[at:at] = draw(known | st.binary(min_size=1, max_size=16))
    return bytes(data)


def json_bytes(whole: Any) -> st.SearchStrategy[bytes]:
    """Return edited JSON, damaged text of JSON, and JSON of many levels."""
    text = to_bytes(whole)
    return st.one_of(
        edited(whole).map(to_bytes),
        edited(whole).map(to_bytes),
        edited(whole).map(to_bytes),
        damaged(text, (b"[", b"}", b"1e999", b"NaN", b"\\ud800", b"\xff", b"9" * 5000)),
        st.sampled_from((b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), *DEEP)),
    )


@st.composite
def edited_table(draw: st.DrawFn, lines: list[list[str]]) -> bytes:
    """Return a CSV file in which cells, columns and lines were changed."""
    table = [list(line) for line in lines]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.integers(0, len(table) - 1))
        line = table[row]
        column = draw(st.integers(0, max(0, len(line) - 1)))
        change = draw(st.sampled_from(("cell", "cell", "cell", "cell", "drop", "add", "line")))
        if change == "cell" and line:
            line[column] = draw(texts)
        elif change == "drop" and line:
            del line[column]
        elif change == "add":
            line.insert(column, draw(texts))
        elif change == "line":
            table.insert(row, list(line))
    quote = draw(st.booleans())
    # Half of the tables quote every cell; commas are the most frequent separator.
    separator = draw(st.sampled_from((",", ",", ",", ";", "\t")))
    text = "\n".join(separator.join(_quoted(cell, quote) for cell in line) for line in table)
    return (text + "\n").encode("utf-8", "surrogatepass")


def _quoted(cell: str, always: bool) -> str:
    if always or any(mark in cell for mark in ',;\t\n\r"'):
        return '"' + cell.replace('"', '""') + '"'
    return cell


def csv_bytes(lines: list[list[str]]) -> st.SearchStrategy[bytes]:
    """Return an edited CSV file, or one whose bytes are damaged or of another encoding."""
    text = ("\n".join(",".join(line) for line in lines) + "\n").encode()
    return st.one_of(
        edited_table(lines),
        edited_table(lines),
        edited_table(lines),
        damaged(text, (b'"', b"\x00", b"\r", b"\xff", b",", b"9" * 200_000)),
        st.sampled_from((b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"))),
    )
