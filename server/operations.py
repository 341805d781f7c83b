"""What operators and dashboards ask: /health, /ready, /metrics, /version."""

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..engine.errors import EngineUnavailable
from ..engine.manager.manager import RolloutManager
from ..engine.messages import PROTOCOL_VERSION
from ..engine.metrics import Counter, Gauge, Histogram
from .http import json_response
from .service import Service

# names on existing dashboards → ours (PROTOCOLS.md 12)
ALIASES = {
    "vllm:num_requests_running": "everstep:num_requests_running",
    "vllm:num_requests_waiting": "everstep:num_requests_waiting",
    "vllm:kv_cache_usage_perc": "everstep:kv_cache_usage_perc",
    "vllm:prefix_cache_queries": "everstep:prefix_cache_queries",
    "vllm:prefix_cache_hits": "everstep:prefix_cache_hits",
    "vllm:num_preemptions": "everstep:num_preemptions",
    "vllm:prompt_tokens": "everstep:prompt_tokens",
    "vllm:generation_tokens": "everstep:generation_tokens",
    "vllm:request_success": "everstep:rollouts_ended",
    "vllm:time_to_first_token_seconds": "everstep:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "everstep:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds": "everstep:e2e_request_latency_seconds",
    "sglang:num_running_reqs": "everstep:num_requests_running",
    "sglang:num_queue_reqs": "everstep:num_requests_waiting",
    "sglang:num_paused_reqs": "everstep:num_requests_paused",
    "sglang:num_used_tokens": "everstep:kv_used_tokens",
    "sglang:max_total_num_tokens": "everstep:kv_total_tokens",
    "sglang:token_usage": "everstep:kv_cache_usage_perc",
    "sglang:cache_hit_rate": "everstep:prefix_cache_hit_rate",
    "sglang:prompt_tokens": "everstep:prompt_tokens",
    "sglang:generation_tokens": "everstep:generation_tokens",
    "sglang:time_to_first_token_seconds": "everstep:time_to_first_token_seconds",
    "sglang:inter_token_latency_seconds": "everstep:inter_token_latency_seconds",
    "sglang:e2e_request_latency_seconds": "everstep:e2e_request_latency_seconds",
}


# labels that those dashboards select by another name
LABELS = {"vllm:request_success": {"reason": "finished_reason"}}


class Family(Struct, frozen=True):
    """One metric with its samples, before it gets a name and labels on the wire."""

    help: str
    labels: tuple[str, ...]
    values: dict[tuple[str, ...], float]
    is_counter: bool = False
    histogram: Histogram | None = None


class Operations:
    """The endpoints over one service. They need no key, and none of them waits for the core."""

    def __init__(self, service: Service) -> None:
        self._manager = service.manager
        self._names = service.config.model_names
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(service.manager, self._names[0]))

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    async def health(self, _: Request) -> Response:
        """Chat goes on without a journal: a full disk alone is said, and does not make it 503."""
        reason = why_unready(self._manager)
        body = {"status": "ok" if reason is None else "unavailable"}
        if self._manager.journal_trouble is not None:
            body["journal"] = self._manager.journal_trouble
        return _status(body, reason)

    async def ready(self, _: Request) -> Response:
        """As /health, with what is served."""
        reason = why_unready(self._manager)
        waits_for_weights = self._manager.versions.waiting_for is not None
        if reason is not None and not waits_for_weights:
            return _status({"ready": False}, reason)
        info = self._manager.info
        body = {
            "ready": reason is None,
            "model": self._names[0],
            "version": info.version,
            "digest": info.digest,
            "numerics": info.numerics,
            "max_model_len": info.max_model_len,
            "core": info.core_id,
        }
        if waits_for_weights:
            body["waits_for"] = "weights"
        return _status(body, reason)

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def version(self, _: Request) -> Response:
        return json_response({"version": __version__, "protocol": PROTOCOL_VERSION})


def why_unready(manager: RolloutManager) -> str | None:
    """None when work is taken, else the reason in words."""
    if manager.is_draining:
        return "the server is shutting down"
    try:
        _ = manager.info
    except EngineUnavailable as error:
        return str(error)
    if manager.versions.waiting_for is not None:
        return manager.versions.waiting_for
    return None if manager.is_healthy else "the engine died"


def _status(body: dict[str, Any], reason: str | None) -> Response:
    if reason is None:
        return json_response(body)
    return json_response(body | {"reason": reason}, status=503, headers={"retry-after": "1"})


class EngineCollector(Collector):
    """The manager's metrics and the core's latest counters, under our names and the aliases."""

    def __init__(self, manager: RolloutManager, model_name: str) -> None:
        self._manager = manager
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        found = families(self._manager)
        for name, family in found.items():
            yield _render(name, family, None)
        for alias, name in ALIASES.items():
            if name in found:
                names = LABELS.get(alias, {})
                labels = tuple(names.get(label, label) for label in found[name].labels)
                family = replace(found[name], labels=labels)
                yield _render(alias, family, self._model_name)


def families(manager: RolloutManager) -> dict[str, Family]:
    """All metrics under our names, without the `_total` that counters have on the wire."""
    return {**_core_families(manager), **_declared(manager.current_metrics())}


def _declared(metrics: Iterable[Counter | Gauge | Histogram]) -> dict[str, Family]:
    families = {}
    for metric in metrics:
        name = metric.name.removesuffix("_total")
        if isinstance(metric, Histogram):
            families[name] = Family(metric.help, metric.labels, {}, histogram=metric)
        else:
            is_counter = isinstance(metric, Counter)
            families[name] = Family(metric.help, metric.labels, metric.values, is_counter)
    return families


def _core_families(manager: RolloutManager) -> dict[str, Family]:
    """From `Stats`: nothing before the core has sent its first."""
    stats = manager.stats
    if stats is None:
        return {}
    try:
        block_size = manager.info.block_size
    except EngineUnavailable:
        block_size = 0
    usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
    queries = stats.prefix_queries_total
    gauges = {
        "num_requests_running": ("rollouts in the batch", stats.num_running),
        "num_requests_waiting": ("rollouts that wait for room", stats.num_waiting),
        "num_requests_paused": ("rollouts that were paused", stats.num_paused),
        "kv_cache_usage_perc": ("KV blocks in use, 0 to 1", usage),
        "kv_used_tokens": ("KV in use, in tokens", stats.num_blocks_used * block_size),
        "kv_total_tokens": ("KV there is, in tokens", stats.num_blocks * block_size),
        "prefix_cache_hit_rate": (
            "prompt tokens spared by the prefix cache, 0 to 1, since the start",
            stats.prefix_hits_total / queries if queries else 0.0,
        ),
    }
    counters = {
        "steps": ("engine steps", stats.steps_total),
        "step_seconds": ("time in engine steps", stats.step_seconds_total),
        "prompt_tokens": ("prompt tokens computed or spared", stats.prompt_tokens_total),
        "generation_tokens": ("tokens sampled", stats.generation_tokens_total),
        "prefix_cache_queries": ("prompt tokens looked up", queries),
        "prefix_cache_hits": ("prompt tokens found", stats.prefix_hits_total),
        "num_preemptions": ("rollouts preempted for memory", stats.preemptions_total),
    }
    families = {
        f"everstep:{name}": Family(words, (), {(): value})
        for name, (words, value) in gauges.items()
    }
    for name, (words, value) in counters.items():
        families[f"everstep:{name}"] = Family(words, (), {(): value}, is_counter=True)
    families["everstep:kv_resume"] = Family(
        "resumptions by where their KV came from",
        ("kind",),
        {(kind,): float(count) for kind, count in stats.kv_resume_total.items()},
        is_counter=True,
    )
    return families


def _render(name: str, family: Family, model_name: str | None) -> Metric:
    """Aliases carry the label `model_name`, as dashboards select by it."""
    labels = [*family.labels, *(() if model_name is None else ("model_name",))]
    extra = () if model_name is None else (model_name,)
    if family.histogram is not None:
        result = HistogramMetricFamily(name, family.help, labels=labels)
        result.add_metric(list(extra), _cumulative(family.histogram), family.histogram.sum)
        return result
    kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    samples = kind(name, family.help, labels=labels)
    for values, number in family.values.items():
        samples.add_metric([*values, *extra], number)
    return samples


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    counts = histogram.counts or [0] * (len(histogram.buckets) + 1)
    bounds = [*map(str, histogram.buckets), "+Inf"]
    total = 0
    buckets = []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
