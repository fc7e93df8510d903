"""Reads the counters that a vLLM server exports."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

EXTERNAL_QUERIES = "vllm:external_prefix_cache_queries"
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"


def scrape(url):
    """All samples of /metrics by name without `_total`, summed over their labels."""
    values = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            values[name] = values.get(name, 0) + sample.value
    return values


def by_label(url, name, label):
    """The samples of one metric, without `_total`, by the value of one of its labels; summed over the others. A metric
    whose samples lack the label has the key ""."""
    values = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            if sample.name.removesuffix("_total") == name:
                key = sample.labels.get(label, "")
                values[key] = values.get(key, 0) + sample.value
    return values


def external_hits(url):
    """Prompt tokens whose KV this server took from its connector since it started, by vLLM's own count. vLLM 0.32
    counts when it plans a load, so one that fails counts as well."""
    return int(scrape(url)[EXTERNAL_HITS])


def pulled_bytes(url, lane):
    """Bytes of KV that arrived here from other servers over this lane, by kvlane's own count: what was planned and
    failed is not in it."""
    return int(by_label(url, "vllm:kvlane_p2p_lane_bytes", "lane").get(lane, 0))
