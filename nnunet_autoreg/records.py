"""Frozen dataclasses as JSON and back, and files that are written whole or not at all.

Unknown keys are refused.
"""

import dataclasses
import errno
import hashlib
import json
import os
import platform
import stat
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nnunet_autoreg.errors import PlanError, did_you_mean, printable

T = TypeVar("T")


def to_jsonable(record: Any) -> Any:
    """Return a dataclass, or a container of them, as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_jsonable(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(k): to_jsonable(v) for k, v in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_jsonable(v) for v in record]
    return record


def from_jsonable(kind: type[T], data: Any, where: str) -> T:
    """Build dataclass ``kind`` from parsed JSON; ``where`` names the file or option in messages.

    The default of a record's own ``version`` is the newest format known here.

    Raises:
        PlanError: a newer format, an unknown or missing key, or a value of the wrong type.
    """
    return typing.cast(T, _convert(kind, data, where))


def _convert(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        # A record may be one of several types, and know which one from the data.
        type_of = getattr(kind, "record_type", None)
        record = kind if type_of is None else type_of(data, where)
        return _convert_record(typing.cast(type, record), data, where)
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        return _convert(kinds[0], data, where)
    if origin is tuple and isinstance(data, (list, tuple)):
        return _convert_tuple(args, data, where)
    if origin is dict and isinstance(data, dict):
        values = {}
        for key, value in data.items():
            values[str(key)] = _convert(args[1], value, f"{where}.{key}")
        return values
    if kind is Any:
        return data

    # In Python True is an int, too, but nobody writes true for 1.
    is_int = isinstance(data, int) and not isinstance(data, bool)
    if is_int and kind in (int, float) and abs(data) > MAX_INT:
        raise PlanError(
            f"{where}: a number with {len(str(abs(data)))} digits is too large",
            code="plan-too-large",
        )
    if kind is float and is_int:
        return float(data)
    if isinstance(kind, type) and isinstance(data, kind) and (kind is not int or is_int):
        return data
    name = getattr(kind, "__name__", kind)
    expected = EXPECTED.get(origin or kind, f"a value of type {name}")
    raise PlanError(
        f"{where}: {shown(data)} is not of type {name}; write {expected}",
        code="plan-wrong-type",
    )


def _convert_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    """Convert a list by the types of a tuple; ``...`` means any number of the first."""
    has_any_length = len(args) == 2 and args[1] is ...
    kinds = [args[0]] * len(data) if has_any_length else list(args)
    if len(kinds) != len(data):
        raise PlanError(
            f"{where}: {shown(data)} has {len(data)} values, {len(kinds)} are needed",
            code="plan-wrong-length",
        )

    values = []
    for number, (kind, value) in enumerate(zip(kinds, data, strict=True)):
        values.append(_convert(kind, value, f"{where}[{number}]"))
    return tuple(values)


# What a value of a type looks like in JSON.
EXPECTED: dict[Any, str] = {
    int: "a whole number, such as 8",
    float: "a number, such as 0.5",
    bool: "true or false",
    str: 'text in quotes, such as "auto"',
    tuple: "a list in square brackets, such as [1, 2]",
    dict: 'an object in braces, such as {"key": 1}',
}
# No number of ours needs more than 64 bits, and larger ones fail in torch and numpy.
MAX_INT = 2**63 - 1
MAX_SHOWN = 200
FORMULA_MARKS = ("=", "+", "-", "@", "\t", "\r")


def shown(data: Any) -> str:
    """Return a value as it is shown in a message, cut if it is long."""
    try:
        text = printable(repr(data))
    except (RecursionError, ValueError):
        return "a value with too many levels or digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def to_cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet takes for a formula; numbers stay numbers."""
    if not text.startswith((*FORMULA_MARKS, "'")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def from_cell(cell: str) -> str:
    """Return the inverse of ``to_cell``."""
    quoted = cell.removeprefix("'")
    is_quoted = quoted != cell and quoted.startswith((*FORMULA_MARKS, "'"))
    return quoted if is_quoted else cell


def _convert_record(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise PlanError(
            f"{where}: expected an object with the keys of {kind.__name__}, found {shown(data)}",
            code="plan-wrong-type",
        )
    fields = {f.name: f for f in dataclasses.fields(kind)}
    newest = fields["version"].default if "version" in fields else None
    version = data.get("version")
    if isinstance(newest, int) and isinstance(version, int) and version > newest:
        raise PlanError(
            f"{where} is of format {version}, newer than {newest}; update nnunet-autoreg",
            code="plan-newer-format",
        )

    for key in data:
        if key not in fields:
            raise PlanError(
                f"{where}: unknown key '{key}'; {did_you_mean(str(key), fields)}",
                code="plan-unknown-key",
            )
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in data and not has_default:
            raise PlanError(f"{where}: the key '{name}' is missing", code="plan-missing-key")

    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    return kind(**values)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return all leaves in which two JSON-able values differ, as ``key: a -> b`` lines."""
    a, b = to_jsonable(a), to_jsonable(b)
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in [*a, *(key for key in b if key not in a)]:
            full_key = f"{where}.{key}" if where else str(key)
            found += differences(a.get(key), b.get(key), full_key)
        return found
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]


TEMPORARY_FILES = ".*.*.tmp"
"""What a killed ``atomic_path`` may leave behind."""


def remove_temporary(folder: Path, pattern: str = TEMPORARY_FILES) -> None:
    """Remove the temporary files that a killed ``atomic_path`` has left in a folder."""
    for torn in folder.glob(pattern):
        torn.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces it if the block ends well.

    The file is flushed to disk before it is renamed. An ``OSError`` of the block names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two machines that share the folder may have the same process number.
    process = f"{platform.node()}-{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{process}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        # The process's mask of new files can only be read by setting it.
        mask = os.umask(0o022)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        # A full disk names no file, and the temporary name says nothing to the user. Copying names
        # the source first.
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if not named or str(temporary) in named:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all.

    Bytes of file names that are not valid text are written as escapes, which JSON reads back as
    they were.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, record: Any) -> None:
    """Write a dataclass or JSON-able value to ``path`` whole or not at all."""
    write_text(path, json.dumps(to_jsonable(record), indent=2, ensure_ascii=False) + "\n")


MEND_OURS = "correct it, or remove it so that it is written again"
MEND_YOURS = "correct it, or restore it"
"""What to do about a damaged file: one that is written here, and one that only its owner has, whose
absence would mean something else.
"""


MAX_JSON_BYTES = 2**29
MAX_JSON_VALUES = 20_000_000
"""Parsed JSON takes several times its size in memory, about 100 bytes for a short value."""


def read_json(path: Path, advice: str = MEND_OURS, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file.

    Args:
        advice: what to do about one that is not JSON.
        max_bytes: a larger file is refused before it is read.

    Raises:
        PlanError: it cannot be read, is too large, or is not JSON.
    """
    try:
        size = regular(path).stat().st_size
        if size > max_bytes:
            raise PlanError(
                f"{path} has {size:,} bytes, more than {max_bytes:,}, and is not read; {advice}",
                code="json-too-large",
            )
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"{path} cannot be read ({error.strerror or error}); {advice}",
            code="json-unreadable",
        ) from error
    except JsonDepthError as error:
        raise PlanError(f"{path} is JSON of {error}; {advice}", code="json-too-deep") from error
    except ValueError as error:
        raise PlanError(
            f"{path} is not valid JSON ({error}); {advice}",
            code="json-invalid",
        ) from error


class JsonDepthError(ValueError):
    """JSON has more levels than Python can follow."""


def regular(path: Path) -> Path:
    """Return ``path`` if it is a file; opening a pipe would wait for its other end forever.

    Raises:
        OSError: it does not exist, or is something else than a file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; memory is bounded and the nesting limited.

    Raises:
        ValueError: it is not JSON, or has too many values or levels.
    """
    num_values = text.count(",") + text.count("[") + text.count("{")
    if num_values > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise JsonDepthError("it is nested too deeply") from error


def read_object(path: Path, keys: Sequence[str] = (), advice: str = MEND_OURS) -> dict[str, Any]:
    """Parse a JSON file that has to hold an object, as ``read_json`` does.

    Args:
        keys: what the object must have.

    Raises:
        PlanError: it cannot be read, is not JSON, holds something else, or a key is missing.
    """
    content = read_json(path, advice)
    if not isinstance(content, dict):
        raise PlanError(
            f"{path} holds {shown(content)} instead of an object in braces; {advice}",
            code="json-no-object",
        )
    for key in keys:
        if key not in content:
            raise PlanError(
                f"{path}: the key '{key}' is missing; {advice}",
                code="json-missing-key",
            )
    return content


def append_json_line(path: Path, record: Any, allow_nan: bool = False) -> None:
    """Append one line of JSON, which is on the disk when the function returns.

    What a kill has left of an unfinished line is removed before. Several processes may append to
    one file.

    Args:
        allow_nan: write NaN and infinity, which JSON does not know, as Python reads them.

    Raises:
        ValueError: the record holds NaN or infinity, and they are not allowed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(to_jsonable(record), allow_nan=allow_nan).encode() + b"\n"

    with path.open("ab+") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - 1))
        if size and handle.read(1) != b"\n":
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)

        # The file is open for appending: lines are written to its end, wherever that is by now.
        handle.write(line)
        handle.flush()
        os.fsync(handle.fileno())


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, without a last one that a kill cut short; [] without a file."""
    if not path.is_file():
        return []
    # What follows the last line break is "" or the beginning of a line.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
