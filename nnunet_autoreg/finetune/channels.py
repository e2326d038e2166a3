"""Map the channels of pretrained weights to the image channels of a dataset.

Torch-free, because planning needs it before any weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelMap:
    """Describe the new columns of the input projection.

    Attributes:
        sources: the channels of the weights that are summed for each image channel.
        factors: the factor of this sum for each image channel.
        note: what was done, for the user; "" if nothing was changed.
    """

    sources: tuple[tuple[int, ...], ...]
    factors: tuple[float, ...]
    note: str


def map_channels(
    given: int,
    given_names: Sequence[str],
    needed: int,
    needed_names: Sequence[str],
) -> ChannelMap | None:
    """Return how ``given`` channels of the weights make ``needed`` image channels, or None.

    Several channels are matched by name if at least one name is shared. A channel without a match
    then starts from the mean of all. Otherwise equal numbers are matched in order, one channel is
    repeated and divided by N, and N channels are summed into one. Other numbers cannot be mapped.

    Args:
        given_names: names of the weights' channels in order; ignored if some are missing.
        needed_names: names of the image channels in order; may be empty if they are not known.
    """
    # Names are safer than the order, because datasets list their channels in any order.
    by_name = _map_by_name(given, given_names, needed_names)
    if by_name is not None:
        return by_name
    if given == needed:
        return ChannelMap(tuple((c,) for c in range(given)), (1.0,) * needed, "")
    if given == 1:
        note = f"1 -> {needed} channels, repeated / {needed}"
        return ChannelMap(((0,),) * needed, (1 / needed,) * needed, note)
    if needed == 1:
        return ChannelMap((tuple(range(given)),), (1.0,), f"{given} -> 1 channels, summed")
    return None


def _map_by_name(
    given: int,
    given_names: Sequence[str],
    needed_names: Sequence[str],
) -> ChannelMap | None:
    """Return a map by names, or None if names are not unique or no name is shared."""
    # One channel has nothing to be mixed up with, regardless of its name.
    position = {_plain(name): c for c, name in enumerate(given_names)}
    if given == 1 or len(given_names) != given or len(position) != given:
        return None

    found = [position.get(_plain(name)) for name in needed_names]
    if all(c is None for c in found):
        return None
    if found == list(range(given)):
        return ChannelMap(tuple((c,) for c in range(given)), (1.0,) * given, "")

    # A channel that pretraining did not know starts from the mean of all known ones.
    sources: list[tuple[int, ...]] = []
    factors: list[float] = []
    notes: list[str] = []
    for name, c in zip(needed_names, found, strict=True):
        if c is None:
            sources.append(tuple(range(given)))
            factors.append(1 / given)
            notes.append(f"{name} <- mean of all {given}")
        else:
            sources.append((c,))
            factors.append(1.0)
            notes.append(f"{name} <- {given_names[c]}")

    note = f"{given} -> {len(needed_names)} channels by name: {', '.join(notes)}"
    return ChannelMap(tuple(sources), tuple(factors), note)


def _plain(name: str) -> str:
    """Return a name without the differences in spelling that do not matter."""
    return name.strip().casefold()
