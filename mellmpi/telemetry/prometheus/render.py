"""Samples as metric families, and these as text."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from mellmpi import __version__
from mellmpi.telemetry.cells import Rows
from mellmpi.telemetry.prometheus.families import COUNTER, FAMILIES, Family


def render(samples: Mapping[str, Rows], accept: str = "", vllm: bool = False) -> tuple[str, bytes]:
    """The content type, and the body of `/metrics`.

    samples  from `Metrics.samples`
    accept   the Accept header: OpenMetrics 1.0 if it is named there, else text format 0.0.4
    vllm     export the metrics that vLLM has also under its prefix
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Samples(samples, vllm))
    if "application/openmetrics-text" not in accept:
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)
    # prometheus-client 0.26 escapes the colon in names of samples, but not in names of families,
    # unless the client allows UTF-8. Our names need no escapes.
    encode: Callable[..., bytes] = openmetrics.generate_latest
    return openmetrics.CONTENT_TYPE_LATEST, encode(registry, escaping=openmetrics.ALLOWUTF8)


class _Samples(Collector):
    """Makes metric families of samples while they are rendered."""

    def __init__(self, samples: Mapping[str, Rows], vllm: bool) -> None:
        self._samples, self._vllm = samples, vllm

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("mellmpi:build", "Version.", {"version": __version__})
        for name, family in FAMILIES.items():
            yield _metric(f"mellmpi:{name}", family, self._samples.get(name, []))
            if self._vllm and family.is_vllm:
                yield _metric(f"vllm:{name}", family, self._samples.get(name, []))


def _metric(name: str, family: Family, rows: Rows) -> Metric:
    if isinstance(family.kind, tuple):
        return _histogram(name, family, family.kind, rows)
    make = CounterMetricFamily if family.kind == COUNTER else GaugeMetricFamily
    metric = make(name, family.help, labels=family.labels)
    for labels, value in rows:
        metric.add_metric(labels, value)
    return metric


def _histogram(name: str, family: Family, bounds: tuple[float, ...], rows: Rows) -> Metric:
    metric = HistogramMetricFamily(name, family.help, labels=family.labels)
    les = [*map(str, bounds), "+Inf"]
    for labels, value in rows:
        counts, total = value
        metric.add_metric(labels, list(zip(les, counts, strict=True)), total)
    return metric
