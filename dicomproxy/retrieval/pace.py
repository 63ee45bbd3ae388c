"""How many orders a source is given at once. Pure but for what it is told.

Every archive waits one round trip for each instance it sends, whatever the
bandwidth. A near one is best asked once, for everything; with a far one the
round trips are hidden by asking on several associations, as many as it takes
for one instance to be always under way, and no more than the source's ceiling.
"""

from __future__ import annotations

import math
from typing import Final

from dicomproxy.dataset.levels import Level
from dicomproxy.ports import Source

FAR_SECONDS: Final = 0.002
"""The round trip from which parallel orders pay."""

_USUAL_SECONDS: Final = 0.001
_LEAST_SECONDS: Final = 0.0001
_WEIGHT: Final = 0.3
_FEWEST_MEASURED: Final = 5
_SET_UP_ROUND_TRIPS: Final = 3  # the request, and an association back to us
_REMEMBERED_SECONDS: Final = 3600.0


def is_near(source: Source) -> bool:
    """Tell whether *source* is so near that no round trip need be hidden."""
    return source.round_trip_seconds < FAR_SECONDS


def takes_lists(source: Source) -> bool:
    """Tell whether *source* is asked by lists of instances, several at a time."""
    return not is_near(source) and source.parallel_retrieves > 1


def orders_at_once(
    round_trip_seconds: float, seconds_per_instance: float, parallel_retrieves: int
) -> int:
    """Return how many orders to have under way: 1 for a source that is near.

    Args:
        round_trip_seconds: to the source, 0 if it is not known.
        seconds_per_instance: what one takes there besides the round trip.
        parallel_retrieves: the source's ceiling.
    """
    if round_trip_seconds < FAR_SECONDS:
        return 1
    wanted = math.ceil(round_trip_seconds / max(seconds_per_instance, _LEAST_SECONDS)) + 1
    return max(1, min(parallel_retrieves, wanted))


class Pace:
    """What was seen of one source: how long an instance takes, how fine it can be asked."""

    def __init__(self) -> None:
        self.seconds_per_instance = _USUAL_SECONDS
        self._finest = Level.IMAGE
        self._until = 0.0

    def finest(self, now: float) -> Level:
        """Return the lowest level at which it takes orders, at loop time *now*."""
        return self._finest if now < self._until else Level.IMAGE

    def refuses_below(self, level: Level, now: float) -> None:
        """Remember, for an hour, that nothing below *level* need be tried."""
        self._finest, self._until = level, now + _REMEMBERED_SECONDS

    def observe(
        self, instances: int, seconds: float, round_trip_seconds: float, at_once: int = 1
    ) -> None:
        """Take an order into account that brought *instances* in *seconds*.

        With *at_once* orders under way, what one instance seems to take is shared
        by all of them, and would make us ask less the more we ask.
        """
        if instances < _FEWEST_MEASURED:
            return  # mostly the setting up
        moving = seconds - _SET_UP_ROUND_TRIPS * round_trip_seconds
        seen = max(_LEAST_SECONDS, (moving / instances - round_trip_seconds) / max(1, at_once))
        self.seconds_per_instance += _WEIGHT * (seen - self.seconds_per_instance)
