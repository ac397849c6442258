"""What `/metrics` serves: names, types and labels; equal to the report of the same events."""

import itertools

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from mellmpi import protocol as p
from mellmpi.telemetry import Metrics
from mellmpi.telemetry.histogram import FOLD_EVERY, TTFT_S, Histogram, one_two_five
from mellmpi.telemetry.moves import Kinds
from mellmpi.telemetry.prometheus import FAMILIES, render
from tests.telemetry.observed import observed
from tests.telemetry.test_metrics import ended, ready, started, state, submit, tokens

ENGINE = {"model_name", "engine"}
MODE = {"model_name", "mode"}
NAMES = {  # what dashboards read -> (type, labels)
    "num_requests_running": ("gauge", ENGINE),
    "num_requests_waiting": ("gauge", ENGINE),
    "kv_cache_usage_perc": ("gauge", ENGINE),
    "prefix_cache_queries": ("counter", ENGINE),
    "prefix_cache_hits": ("counter", ENGINE),
    "num_preemptions": ("counter", ENGINE),
    "prompt_tokens": ("counter", ENGINE),
    "generation_tokens": ("counter", ENGINE),
    "time_to_first_token_seconds": ("histogram", ENGINE),
    "inter_token_latency_seconds": ("histogram", ENGINE),
    "e2e_request_latency_seconds": ("histogram", ENGINE),
    "request_queue_time_seconds": ("histogram", ENGINE),
    "request_prompt_tokens": ("histogram", ENGINE),
    "request_generation_tokens": ("histogram", ENGINE),
    "request_success": ("counter", ENGINE | {"finished_reason"}),
    "migrations": ("counter", {"model_name", "src", "dst", "mode", "reason", "outcome"}),
    "migration_seconds": ("histogram", MODE),
    "migration_predicted_seconds": ("histogram", MODE),
    "migration_downtime_seconds": ("histogram", MODE),
    "migration_bytes": ("histogram", MODE),
    "link_bandwidth_bytes_per_second": ("gauge", {"src", "dst", "path"}),
    "active_gpus": ("gauge", set()),
    "gpu_seconds": ("counter", set()),
    "gpu_seconds_all_on": ("counter", set()),
    "build": ("info", {"version"}),
}
OURS = {name for name, (_, labels) in NAMES.items() if not labels >= ENGINE}
OPEN = "application/openmetrics-text; version=1.0.0"


def assigned(m, now, worker, request_id=1):
    order = p.Assign(p.Request(request_id, "m", (1, 2, 3, 4, 5), p.GREEDY, None, 0, None), 1, ())
    m.command(now, worker, order)


def parsed(m, now, accept="", links=(), **switch):
    """{family: metric}"""
    content_type, body = render(m.samples(now, links), accept, **switch)
    assert content_type.startswith("application/openmetrics-text" if accept else "text/plain")
    parse = open_metrics if accept else plain
    return {metric.name: metric for metric in parse(body.decode())}


def values(metrics, name):
    """{label values without the model: value} of one sample name."""
    family = metrics[f"mellmpi:{name}"]
    suffix = "_total" if family.type == "counter" else ""
    return {
        tuple(v for k, v in sorted(s.labels.items()) if k != "model_name"): s.value
        for s in family.samples
        if s.name == f"mellmpi:{name}{suffix}"
    }


def busy():
    """A run in which each metric has a sample: one request decodes and has moved, one waits."""
    m = Metrics()
    for worker in (1, 2):
        ready(m, 0.0, worker)
    for request_id in (1, 2, 3):
        submit(m, 1.0, request_id)
    assigned(m, 1.5, 1)
    tokens(m, 2.0, 1, 3)
    started(m, 2.1, "transfer", 1, 2)
    ended(m, 2.4, "transfer", 1, 2)
    tokens(m, 2.5, 2, 2)
    assigned(m, 2.5, 2, request_id=3)
    tokens(m, 2.6, 2, 2, request_id=3, finish="length")
    return m


@pytest.mark.parametrize("accept", ["", OPEN])
def test_the_names_types_and_labels_are_those_that_dashboards_read(accept):
    found = parsed(busy(), 3.0, accept, links=[(0, 1, 1e9)])
    if not accept:  # the text format has no info
        found["mellmpi:build"] = found.pop("mellmpi:build_info")
        found["mellmpi:build"].type = "info"
    assert {name: family.type for name, family in found.items()} == {
        f"mellmpi:{name}": kind for name, (kind, _) in NAMES.items()
    }
    for name, (_, labels) in NAMES.items():
        samples = found[f"mellmpi:{name}"].samples
        assert samples, name
        assert {frozenset(s.labels.keys() - {"le"}) for s in samples} == {frozenset(labels)}, name


def test_a_switch_also_exports_the_names_of_vllm():
    assert not [name for name in parsed(busy(), 3.0) if name.startswith("vllm")]
    found = parsed(busy(), 3.0, vllm=True)
    theirs = {name.removeprefix("vllm:") for name in found if name.startswith("vllm:")}
    assert theirs == NAMES.keys() - OURS
    for name in theirs:
        ours = found[f"mellmpi:{name}"].samples
        assert [(s.labels, s.value) for s in found[f"vllm:{name}"].samples] == [
            (s.labels, s.value) for s in ours
        ]


def test_every_family_has_a_row_in_the_table():
    assert {*FAMILIES, "build"} == NAMES.keys()


def test_samples_are_plain_data_that_another_process_can_render():
    samples = busy().samples(3.0, [(0, 0, 1e9)])
    assert render(msgpack.unpackb(msgpack.packb(samples))) == render(samples)


def test_nothing_observed_is_a_valid_answer():
    assert values(parsed(Metrics(), 5.0), "active_gpus") == {(): 0}


def test_requests_count_where_they_are():
    found = parsed(busy(), 3.0)
    assert values(found, "num_requests_running") == {("1",): 0, ("2",): 1}
    assert values(found, "num_requests_waiting") == {("0",): 1}
    assert values(found, "generation_tokens") == {("0",): 0, ("1",): 3, ("2",): 4}
    assert values(found, "prompt_tokens") == {("0",): 0, ("1",): 5, ("2",): 5}
    assert values(found, "request_success")["2", "length"] == 1
    assert values(found, "migrations") == {("2", "transfer", "moved", "drain", "1"): 1}


def sums(metrics, name, label="engine"):
    family = metrics[f"mellmpi:{name}"]
    found = {s.labels[label]: s.value for s in family.samples if s.name.endswith("_sum")}
    return pytest.approx(found)


def test_a_histogram_has_its_samples_with_their_worker():
    found = parsed(busy(), 3.0)
    assert sums(found, "request_queue_time_seconds") == {"0": 0, "1": 0.5, "2": 1.5}
    assert sums(found, "time_to_first_token_seconds") == {"0": 0, "1": 1.0, "2": 1.6}
    assert sums(found, "inter_token_latency_seconds") == {"0": 0, "1": 0, "2": 0.5}
    assert sums(found, "e2e_request_latency_seconds") == {"0": 0, "1": 0, "2": 1.6}
    assert sums(found, "migration_seconds", "mode") == {"transfer": 0.3}
    assert sums(found, "migration_predicted_seconds", "mode") == {"transfer": 1.0}
    downtime = found["mellmpi:migration_downtime_seconds"].samples
    below = {s.labels["le"]: s.value for s in downtime if s.name.endswith("_bucket")}
    assert below["0.3"] == 0 and below["0.5"] == 1 == below["+Inf"]


def test_a_request_that_is_placed_again_counts_once():
    m = busy()
    m.command(2.7, p.OBSERVER, p.Preempted(1, 2))
    assert values(parsed(m, 2.8), "num_requests_waiting") == {("0",): 2}
    assigned(m, 2.9, 1)
    found = parsed(m, 3.0)
    assert values(found, "prompt_tokens") == {("0",): 0, ("1",): 5, ("2",): 5}
    assert sums(found, "request_queue_time_seconds") == {"0": 0, "1": 0.5, "2": 1.5}
    assert values(found, "num_preemptions") == {("0",): 0, ("1",): 0, ("2",): 1}


def test_counters_begin_at_0_before_the_first_request():
    m = Metrics()
    ready(m, 0.0, 1)
    found = parsed(m, 1.0)
    assert values(found, "num_requests_waiting") == {("0",): 0}
    assert values(found, "generation_tokens") == {("0",): 0, ("1",): 0}


def test_a_worker_that_is_lost_before_it_is_ready_has_no_kv():
    m = Metrics()
    state(m, 0.0, 1, "starting")
    state(m, 1.0, 1, "lost")
    assert values(parsed(m, 2.0), "kv_cache_usage_perc") == {}


def test_gpu_seconds_saved_are_the_difference_of_two_counters():
    m = Metrics()
    for worker in (1, 2):
        ready(m, 0.0, worker)
    assert values(parsed(m, 5.0), "gpu_seconds") == values(parsed(m, 5.0), "gpu_seconds_all_on")
    submit(m, 10.0)
    state(m, 13.0, 2, "parked")
    found = parsed(m, 20.0)
    assert values(found, "active_gpus") == {(): 1}
    assert values(found, "gpu_seconds") == {(): 13}
    assert values(found, "gpu_seconds_all_on") == {(): 20}


def test_a_parked_worker_uses_no_kv():
    m = Metrics()
    ready(m, 0.0, 1, capacity=1000)
    m.observe(1.0, 1, p.StepReport(1, 0.1, 0, 1, 250, 0, *((),) * 7, 0, (), ()))
    assert values(parsed(m, 2.0), "kv_cache_usage_perc") == {("1",): 0.75}
    state(m, 3.0, 1, "parked")
    assert values(parsed(m, 4.0), "kv_cache_usage_perc") == {("1",): 0}


def test_hits_of_the_prefix_cache_count_where_the_worker_found_them():
    m = busy()
    m.observe(
        2.7, 2, p.StepReport(1, 0.1, 0, 1, 250, 0, *((),) * 7, 0, ((1, 4), (2, 0), (99, 3)), ())
    )
    found = parsed(m, 3.0)
    assert values(found, "prefix_cache_queries")[("2",)] == 10
    assert values(found, "prefix_cache_hits") == {("0",): 0, ("1",): 0, ("2",): 4}


def test_links_have_hosts_and_the_path_between_them():
    found = parsed(Metrics(), 1.0, links=[(0, 0, 5e9), (0, 1, 1e9)])
    bandwidth = values(found, "link_bandwidth_bytes_per_second")
    assert bandwidth == {("0", "host", "0"): 5e9, ("1", "network", "0"): 1e9}


# --- bounds --------------------------------------------------------------------------------------


def test_labels_do_not_grow_with_models_that_clients_invent():
    m = Metrics()
    ready(m, 0.0, 1)
    for i in range(100):
        request = p.Request(i, f"invented {i}", (1,), p.GREEDY, None, 0, None)
        m.observe(1.0, p.FRONT, p.Submit(request))
        m.command(1.0, p.FRONT, p.Rejected(i, "no such model", 0.0))
    models = {s.labels["model_name"] for s in parsed(m, 2.0)["mellmpi:request_success"].samples}
    assert models == {"m", ""}


def test_numbers_in_reasons_and_outcomes_do_not_make_new_labels():
    m = busy()
    for i in range(300):
        started(m, 3.0, "transfer", 1, 2)
        ended(m, 3.0, "transfer", 1, 2, outcome=f"worker {i} lost")
    counts = values(parsed(m, 4.0), "migrations")
    assert counts["2", "transfer", "worker lost", "drain", "1"] == 300 and len(counts) == 2


def test_free_text_makes_a_bounded_number_of_kinds():
    kinds, words = Kinds(most=5), ("".join(t) for t in itertools.product("abcdef", repeat=4))
    assert kinds.of("failed: KV layout") == "failed: KV layout"
    assert len({kinds.of(word) for word in words}) == 5 and kinds.of("zzz") == "other"
    assert kinds.of("failed: KV layout") == "failed: KV layout"


@given(st.lists(st.floats(0, 1e4), max_size=3 * FOLD_EVERY))
def test_a_histogram_counts_each_value_in_every_bucket_that_holds_it(numbers):
    histogram = Histogram(TTFT_S)
    for number in numbers:
        histogram.add(number)
    counts, total = histogram.read()
    assert counts == [sum(n <= bound for n in numbers) for bound in (*TTFT_S, np.inf)]
    assert total == pytest.approx(sum(numbers)) and histogram.read() == (counts, total)


def test_buckets_of_tokens_are_one_two_five():
    assert one_two_five(2000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


# --- the report of the same events ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_counters_agree_with_the_report(seed):
    sim = observed(seed)
    report, found = sim.metrics.report(sim.now), parsed(sim.metrics, sim.now)

    def total(name, *having):
        family = found[f"mellmpi:{name}"]
        assert family.type in ("counter", "gauge")
        return sum(s.value for s in family.samples if set(having) <= set(s.labels.values()))

    def of(name, suffix):
        samples = found[f"mellmpi:{name}"].samples
        return sum(s.value for s in samples if s.name == f"mellmpi:{name}_{suffix}")

    assert total("generation_tokens") == report["output_tokens"]
    assert total("generation_tokens") == sum(map(len, sim.outcome.outputs.values()))
    completed = total("request_success", "stop") + total("request_success", "length")
    assert completed == report["completed"] == of("e2e_request_latency_seconds", "count")
    assert of("request_prompt_tokens", "count") == completed
    ended_by_token = [i for i, why in sim.outcome.finished.items() if why != "cancelled"]
    tokens_of_ended = sum(len(sim.outcome.outputs[i]) for i in ended_by_token)
    assert of("request_generation_tokens", "sum") == tokens_of_ended
    assert total("request_success", "abort") == report["cancelled"]
    assert total("request_success", "error") == report["failed"]
    assert total("num_preemptions") == report["preemptions"]
    assert total("prefix_cache_hits") <= total("prefix_cache_queries")
    assert of("time_to_first_token_seconds", "count") == len(sim.outcome.outputs)
    for mode, moves in report["migrations"].items():
        if mode != "failed":
            assert total("migrations", mode, "moved") == moves
    assert total("migrations") == sum(report["migration_outcomes"].values())
    assert of("migration_seconds", "count") == total("migrations", "moved")
    assert of("migration_bytes", "sum") == report["migrated_bytes"]
    assert total("gpu_seconds") == pytest.approx(report["gpu_seconds_active"])
    assert total("gpu_seconds_all_on") == pytest.approx(report["gpu_seconds_total"])
    assert total("num_requests_running") == total("num_requests_waiting") == 0
