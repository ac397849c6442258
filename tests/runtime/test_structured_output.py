"""Structured output in complete runs: valid answers, and the same ones after random moves."""

import json
import re
from pathlib import Path

from tests.engine.answers import fits
from tests.runtime.jobs import STRESS, TINY, Run, line

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["kind", "tall", "old"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def run_batch(tmp_path: Path, name: str, num_ranks: int, *args: str):
    """Run tmp_path/in.jsonl. Returns (custom_id -> response, report)."""
    directory = tmp_path / name
    directory.mkdir()
    out, report = directory / "out.jsonl", directory / "report.json"
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(out), "--report", str(report)]
    done = Run(num_ranks, "run-batch", *files, *args, directory=directory).wait(240)
    assert done.code == 0, done.err
    entries = map(json.loads, out.read_text().splitlines())
    return {e["custom_id"]: e["response"] for e in entries}, json.loads(report.read_text())


def test_a_real_model_answers_in_the_form_that_was_asked_for(tmp_path, smollm2):
    ask = [{"role": "user", "content": "Describe a person as JSON."}]
    url, schema = "/v1/chat/completions", response_format(PERSON)
    lines = [
        line("json", url, messages=ask, max_tokens=300, response_format=schema, n=3),
        line("choice", url, messages=ask, max_tokens=20, guided_choice=["yes", "no"]),
        line("date", prompt="Today is", max_tokens=20, guided_regex=DATE, temperature=0),
        line("free", prompt="Today is", max_tokens=5),
        line("not", prompt="a", response_format=response_format({"not": {}})),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    found, _ = run_batch(tmp_path, "one", 1, "--model", str(smollm2))
    for choice in found["json"]["body"]["choices"]:
        assert choice["finish_reason"] == "stop"
        assert fits(json.loads(choice["message"]["content"]), PERSON)
    assert found["choice"]["body"]["choices"][0]["message"]["content"] in ("yes", "no")
    assert re.fullmatch(DATE, found["date"]["body"]["choices"][0]["text"])
    assert found["free"]["status_code"] == 200
    assert found["not"]["status_code"] == 400
    assert "'not', which is not supported" in found["not"]["body"]["error"]["message"]


def test_moves_change_no_token_of_an_answer_with_a_grammar(tmp_path):
    names = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 9}
    kinds = [
        {"response_format": response_format(names)},
        {"guided_regex": "([a-z]{2,9} ){20,40}end"},
        {"response_format": {"type": "json_object"}, "temperature": 0},
        {"min_tokens": 30, "logit_bias": {"70": 5, "71": -100}},
        {"allowed_token_ids": [2, *range(70, 90)], "frequency_penalty": 0.5},
    ]
    lines = [
        line(f"{i}", prompt=[9, 9 + i], max_tokens=150, return_token_ids=True, **kinds[i % 5])
        for i in range(40)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    expected, _ = run_batch(tmp_path, "alone", 1, *TINY)
    moved, report = run_batch(tmp_path, "moved", 3, *TINY, *STRESS)
    assert sum(report["migrations"].values()) > 20
    assert len(expected) == 40
    for name, response in expected.items():
        assert response["status_code"] == 200
        assert moved[name]["body"]["choices"] == response["body"]["choices"]
