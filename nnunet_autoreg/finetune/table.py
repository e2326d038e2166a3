"""Describe what happened to every tensor when pretrained weights were loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

LOADED, ADAPTED, RANDOM, UNUSED = "loaded", "adapted", "random", "unused"
MAX_NAMES = 3


@dataclass(frozen=True)
class TensorEntry:
    """Hold the origin of one tensor.

    Attributes:
        num_parameters: number of its values.
        status: ``LOADED``, ``ADAPTED``, ``RANDOM`` or ``UNUSED``.
        note: how it was adapted, or why it was not loaded.
    """

    key: str
    num_parameters: int
    status: str
    note: str = ""


@dataclass(frozen=True)
class WeightTable:
    """Hold the origin of all tensors of a network.

    Attributes:
        source: name of the weights, for the user.
        entries: the tensors of the encoder.
        decoder: the tensors of a decoder that was pretrained too; empty if none is transferred.
        rest: all other parameters, which start at random.
        unused: tensors of the file that are not loaded into this network.
        licences: one line about the licences of the weights, "" if none is stated.
    """

    source: str
    entries: tuple[TensorEntry, ...]
    rest: TensorEntry
    decoder: tuple[TensorEntry, ...] = ()
    unused: tuple[TensorEntry, ...] = ()
    licences: str = ""

    @property
    def encoder_share(self) -> float:
        """Return the share of the encoder's parameters that come from the file, 0 to 1."""
        return _share(self.entries)

    @property
    def decoder_share(self) -> float:
        """Return the share of the decoder's parameters that come from the file, 0 to 1.

        Its heads do not count.
        """
        return _share(self.decoder)

    def lines(self) -> list[str]:
        """Return the table as text: one line per status, the decoder below the encoder."""
        lines = [f"encoder weights from {self.source}", *_lines_by_status(self.entries)]
        shares = f"{100 * self.encoder_share:.1f} % of the encoder's parameters come from the file"
        if self.decoder:
            lines += ["decoder weights from the same file", *_lines_by_status(self.decoder)]
            shares += f", and {100 * self.decoder_share:.1f} % of the decoder's"

        label = "new" if self.decoder else "decoder"
        rest = f"{self.rest.key} ({self.rest.note})"
        lines.append(_line(label, 1, self.rest.num_parameters, rest, unit="part"))
        if self.unused:
            lines.append(_status_line(UNUSED, self.unused))
        if self.licences:
            lines.append(f"  {self.licences}")
        lines.append(f"  {shares}")
        return lines


def _share(entries: Sequence[TensorEntry]) -> float:
    total = sum(entry.num_parameters for entry in entries)
    given = sum(entry.num_parameters for entry in entries if entry.status != RANDOM)
    if total == 0:
        return 0.0
    return given / total


def _lines_by_status(entries: Sequence[TensorEntry]) -> list[str]:
    lines = []
    for status in (LOADED, ADAPTED, RANDOM):
        chosen = [entry for entry in entries if entry.status == status]
        lines.append(_status_line(status, chosen))
    return lines


def _status_line(status: str, entries: Sequence[TensorEntry]) -> str:
    notes = ""
    if status != LOADED:
        # Keys with the same note are grouped.
        keys: dict[str, list[str]] = {}
        for entry in entries:
            keys.setdefault(entry.note, []).append(entry.key)
        parts = []
        for note, names in keys.items():
            parts.append(f"{some(names)} ({note})" if note else some(names))
        notes = "; ".join(parts)

    num_parameters = sum(entry.num_parameters for entry in entries)
    return _line(status, len(entries), num_parameters, notes)


def _line(label: str, count: int, num_parameters: int, notes: str, unit: str = "tensors") -> str:
    number = f"{count:>4} {unit:<7} {num_parameters:>12,} parameters"
    return f"  {label:<8} {number}  {notes}".rstrip()


def some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    first = "; ".join(names[:MAX_NAMES])
    num_more = len(names) - MAX_NAMES
    if num_more <= 0:
        return first
    return f"{first} and {num_more} more"
