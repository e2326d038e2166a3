"""Which channels of the weights each image channel of a dataset starts from.

Torch-free: planning asks before any weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelMap:
    """The input projection's new columns.

    Attributes:
        sources: for each image channel, the channels of the weights that are summed for it.
        factors: what each of those sums is multiplied with.
        note: what was done, "" where nothing had to be.
    """

    sources: tuple[tuple[int, ...], ...]
    factors: tuple[float, ...]
    note: str


def map_channels(
    given: int, given_names: Sequence[str], needed: int, needed_names: Sequence[str]
) -> ChannelMap | None:
    """Map ``given`` channels of the weights onto ``needed`` image channels; None where that cannot
    be done.

    Several channels go by name where a name is shared: a channel without a namesake starts from the
        mean of all. Otherwise as
    many as there are go one to one, one is repeated / N, and N are summed into one.

    Args:
        given_names: names of the weights' channels in order; ignored unless there is one for each.
        needed_names: names of the image channels in order; may be empty where they are unknown.
    """
    everything = tuple(range(given))
    by_name = _by_name(given, given_names, needed_names)
    if by_name is not None:
        return by_name
    if given == needed:
        return ChannelMap(tuple((c,) for c in everything), (1.0,) * needed, "")
    if given == 1:
        return ChannelMap(
            ((0,),) * needed, (1 / needed,) * needed, f"1 -> {needed} channels, repeated / {needed}"
        )
    if needed == 1:
        return ChannelMap((everything,), (1.0,), f"{given} -> 1 channels, summed")
    return None


def _by_name(
    given: int, given_names: Sequence[str], needed_names: Sequence[str]
) -> ChannelMap | None:
    position = {_plain(name): c for c, name in enumerate(given_names)}
    if given == 1 or len(given_names) != given or len(position) != given:
        return None
    if not any(_plain(name) in position for name in needed_names):
        return None
    found = [position.get(_plain(name)) for name in needed_names]
    if found == list(range(given)):
        return ChannelMap(tuple((c,) for c in range(given)), (1.0,) * given, "")
    sources = tuple(tuple(range(given)) if c is None else (c,) for c in found)
    factors = tuple(1 / given if c is None else 1.0 for c in found)
    origins = (f"mean of all {given}" if c is None else given_names[c] for c in found)
    told = ", ".join(
        f"{name} <- {origin}" for name, origin in zip(needed_names, origins, strict=True)
    )
    return ChannelMap(sources, factors, f"{given} -> {len(needed_names)} channels by name: {told}")


def _plain(name: str) -> str:
    return name.strip().casefold()
