"""`/metrics` as a scraper sees it."""

import json

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from mellmpi.protocol import ModelKv, WorkerReady
from mellmpi.telemetry import Metrics

OPEN = "application/openmetrics-text"


@pytest.fixture
def counted(cell):
    """The server of the other tests, with the metrics of one idle worker."""
    metrics = Metrics()
    kv = ModelKv("tiny", 16, 64)
    metrics.observe(0.0, 1, WorkerReady((kv,), 1000, 8, 0, 0.0, 64, None, (), ""))
    samples = metrics.samples(1.0, [(0, 0, 1e9)])

    def serve(vllm):
        cell.front.questions["metrics"] = lambda: json.dumps({"samples": samples, "vllm": vllm})

    yield serve
    del cell.front.questions["metrics"]


@pytest.mark.parametrize(
    ("accept", "parse"), [("", plain), (f"{OPEN}; version=1.0.0", open_metrics)]
)
def test_the_format_is_that_which_the_scraper_accepts(http, counted, accept, parse):
    counted(vllm=False)
    response = http.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith(OPEN if accept else "text/plain; version=")
    found = {s.name: s.value for family in parse(response.text) for s in family.samples}
    assert found["mellmpi:active_gpus"] == 1
    assert found["mellmpi:link_bandwidth_bytes_per_second"] == 1e9
    assert not any(name.startswith("vllm:") for name in found)


def test_the_names_of_vllm_are_there_when_asked_for(http, counted):
    counted(vllm=True)
    assert "\nvllm:num_requests_running{" in http.get("/metrics").text
