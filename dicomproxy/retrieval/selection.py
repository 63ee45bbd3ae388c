"""Which instances of one study somebody asks for. Pure.

A selection is what a request, an order and a claim have in common: the whole
study, some of its series, or some of its instances.
"""

from __future__ import annotations

from dataclasses import dataclass

from dicomproxy.dataset.levels import Level
from dicomproxy.ports import RetrieveOrder


@dataclass(frozen=True, slots=True)
class Selection:
    """Instances of one study; ``level`` is STUDY, SERIES or IMAGE.

    At IMAGE level the SOP Instance UIDs decide alone, since they are unique;
    the series they were named with only serves to address them.
    """

    level: Level = Level.STUDY
    series_instance_uids: frozenset[str] = frozenset()
    sop_instance_uids: frozenset[str] = frozenset()

    def covers(self, series_instance_uid: str, sop_instance_uid: str) -> bool:
        """Tell whether an instance is among those asked for."""
        if self.level is Level.IMAGE:
            return sop_instance_uid in self.sop_instance_uids
        return self.covers_series(series_instance_uid)

    def covers_series(self, series_instance_uid: str) -> bool:
        """Tell whether a whole series is asked for."""
        if self.level is Level.SERIES:
            return series_instance_uid in self.series_instance_uids
        return self.level is not Level.IMAGE

    def named(self) -> dict[str, str]:
        """Return the instances asked for by name, with the series they were named with."""
        series = next(iter(self.series_instance_uids), "")
        return dict.fromkeys(self.sop_instance_uids, series) if self.level is Level.IMAGE else {}


def selection_of(order: RetrieveOrder) -> Selection:
    """Return what *order* asks for of its one study."""
    return Selection(
        order.level, frozenset(order.series_instance_uids), frozenset(order.sop_instance_uids)
    )
