"""The dashboard reads metrics that exist, by labels that they have."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mellmpi.telemetry.prometheus import render
from tests.telemetry.test_prometheus import busy

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
NAME = re.compile(r"mellmpi:[a-z0-9_]+")


@pytest.fixture(scope="module")
def labels():
    """{name of a sample: its labels}"""
    _, body = render(busy().samples(3.0, [(0, 1, 1e9)]))
    families = text_string_to_metric_families(body.decode())
    return {s.name: set(s.labels) for family in families for s in family.samples}


@pytest.mark.parametrize(("title", "target"), TARGETS)
def test_a_panel_reads_metrics_that_exist_by_labels_that_they_have(labels, title, target):
    names = NAME.findall(target["expr"])
    assert names and set(names) <= labels.keys()
    used = {
        label.strip()
        for by in re.findall(r"by \(([^)]*)\)", target["expr"])
        for label in by.split(",")
    }
    used |= set(re.findall(r'([a-z_]+)=~?"', target["expr"]))
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    for name in names:
        assert used | shown <= labels[name], name
    assert shown <= used or "by (" not in target["expr"]


def test_variables_read_metrics_that_exist(labels):
    queries = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert queries and all(set(NAME.findall(query)) <= labels.keys() for query in queries)


def test_the_data_source_is_a_variable():
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    for panel in PANELS:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_metric_is_on_the_dashboard(labels):
    shown = {name for _, target in TARGETS for name in NAME.findall(target["expr"])}
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert bare - shown == {"mellmpi:build_info"}


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
