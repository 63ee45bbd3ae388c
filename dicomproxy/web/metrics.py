"""The metrics page: what every room counts, and what only a snapshot knows.

A metric is declared where it is counted and needs nothing from here. Those
below describe a moment and are made from the snapshot of each request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dicomproxy.web.status import StatusSnapshot


def render_metrics(snapshot: StatusSnapshot) -> bytes:
    """Return both kinds in Prometheus' text format.

    Reads files of the system (the process's memory and descriptors): not for
    the event loop's thread.
    """
    own = CollectorRegistry(auto_describe=False)
    own.register(_SnapshotCollector(snapshot))
    return generate_latest(REGISTRY) + generate_latest(own)


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: StatusSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[GaugeMetricFamily]:
        given = self._snapshot
        build = GaugeMetricFamily(
            "dicomproxy_build_info",
            "Always 1; the label says which version runs.",
            labels=["version"],
        )
        build.add_metric([given.version], 1)
        yield build
        yield _gauge("ready", "1 while associations are accepted, else 0.", given.state == "ready")
        yield _gauge("start_time_seconds", "When it was started, since 1970.", given.started_at)
        yield _gauge("associations_limit", "Associations accepted at most.", given.max_associations)
        yield _gauge(
            "cache_max_bytes", "Bytes that the cache may hold.", given.cache.max_size_bytes
        )

        reachable = _labelled("source_up", "1 if the latest exchange worked, else 0.", "source")
        slots = _labelled(
            "source_associations",
            "Associations with a source, and their ceiling.",
            "source",
            "state",
        )
        for source in given.sources:
            if source.reachable is not None:
                reachable.add_metric([source.name], source.reachable)
            slots.add_metric([source.name, "in_use"], source.in_use)
            slots.add_metric([source.name, "idle"], source.idle)
            slots.add_metric([source.name, "limit"], source.ceiling)
        yield reachable
        yield slots

        running = _labelled("operations_running", "Operations under way.", "kind")
        for kind, count in sorted(Counter(each.kind for each in given.operations).items()):
            running.add_metric([kind], count)
        yield running
        stuck = sum(operation.stuck for operation in given.operations)
        yield _gauge("tasks", "Tasks of the event loop; few while all is quiet.", given.tasks)
        yield _gauge("operations_stuck", "Operations without progress for half a minute.", stuck)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dicomproxy_{name}", text, value=float(value))


def _labelled(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dicomproxy_{name}", text, labels=labels)
