"""Structured output: which bodies become a grammar, and which are refused, by field and keyword."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from mellmpi.frontend import ServedModels, Tokenizer
from mellmpi.frontend import grammar as front_grammar
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.openai import COMPLETIONS, parse
from tests.frontend.tokenizers_of_each_kind import byte_fallback, unigram, word_piece


@pytest.fixture(scope="session")
def served(tokenizer, model):
    return ServedModels.of((model, tokenizer))


@pytest.fixture(scope="session")
def llguidance_tokenizer(tokenizer):
    return LLTokenizer(tokenizer.json)


@pytest.fixture(scope="session")
def grammar_of(served):
    """Body -> grammar."""

    def build(**body) -> str:
        call = parse(COMPLETIONS, {"prompt": "abc", **body}, served, "me")
        return call.samplings[0].grammar

    return build


@pytest.fixture(scope="session")
def matches(grammar_of, llguidance_tokenizer):
    """(text, body) -> whether the text is a complete answer."""

    def check(text: str, **body) -> bool:
        matcher = LLMatcher(llguidance_tokenizer, grammar_of(**body), log_level=0)
        tokens = llguidance_tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


@pytest.fixture(scope="session")
def refused(grammar_of):
    def check(**body) -> BadRequest:
        with pytest.raises(BadRequest) as caught:
            grammar_of(**body)
        assert caught.value.status == 400
        return caught.value

    return check


def of_schema(schema, **more):
    inner = {"name": "x", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@pytest.mark.parametrize(
    "body",
    [
        of_schema(SCHEMA, strict=True, description="y"),
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"guided_json": {**SCHEMA, "$schema": "http://json-schema.org/draft-07/schema#"}},
    ],
)
def test_all_forms_of_a_schema(matches, body):
    assert matches('{"a": 1}', **body) and matches('{\n  "a": 2\n}', **body)
    assert not matches('{"a": 3}', **body) and not matches("{}", **body)
    assert not matches('{"a": 1', **body)


def test_what_is_beside_a_reference_counts_whatever_draft_the_schema_names(matches):
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"a": {"type": "string"}},
        "$ref": "#/definitions/a",
        "maxLength": 2,
    }
    assert matches('"ab"', guided_json=schema) and not matches('"abc"', guided_json=schema)


def test_white_space_is_bounded(matches):
    assert matches(f'{{{" " * 20}"a":1}}', guided_json=SCHEMA)
    assert not matches(f'{{{" " * 21}"a":1}}', guided_json=SCHEMA)


@pytest.mark.parametrize(
    "body",
    [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}],
)
def test_any_json_object(matches, body):
    assert matches('{"x": [1, {"y": null}]}', **body)
    assert not matches("[1]", **body) and not matches("hello", **body)


@pytest.mark.parametrize(
    "body", [{"guided_regex": "a/b+|x"}, {"structured_outputs": {"regex": "a/b+|x"}}]
)
def test_a_regex_matches_the_whole_answer(matches, body):
    assert matches("a/bb", **body) and matches("x", **body)
    assert not matches("a/bbc", **body) and not matches("ax", **body)


LARK = 'start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]*/'
GBNF = 'root ::= greeting " " [A-Z] [a-z]*\ngreeting ::= "hi" | "hello"'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_grammars_in_lark_and_gbnf(matches, text):
    for body in ({"guided_grammar": text}, {"structured_outputs": {"grammar": text}}):
        assert matches("hello Ada", **body) and not matches("hello ada", **body)


@given(choices=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4, unique=True))
def test_every_choice_matches_itself_and_nothing_else(matches, choices):
    for choice in choices:
        assert matches(choice, guided_choice=choices)
    assert not matches(
        choices[0] + "…", guided_choice=[c for c in choices if not c.endswith("…")] or ["x"]
    )


def test_the_draft_that_a_schema_names_need_not_be_known(matches):
    schema = {"$schema": "https://example.com/own", "const": 5}
    assert matches("5", guided_json=schema) and not matches("6", guided_json=schema)


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
        {"guided_json": None},
    ],
)
def test_no_grammar(grammar_of, body):
    assert grammar_of(**body) == ""


# --- refused -------------------------------------------------------------------------------------

KEYWORDS = {
    "not": {"type": "null"},
    "if": {"type": "null"},
    "then": True,
    "uniqueItems": True,
    "contains": {"type": "null"},
    "propertyNames": {"pattern": "a"},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "additionalItems": False,
    "$dynamicRef": "#x",
    "contentEncoding": "base64",
    "nullable": True,
    "lenient": True,
    "x-guidance": {"lenient": True},
    "proprties": {},
}


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_that_is_not_enforced_is_refused_by_name_and_place(refused, keyword):
    bad = {"type": "string", keyword: KEYWORDS[keyword]}
    for schema, place in [
        (bad, "the schema has"),
        ({"properties": {"p": {"items": bad}}}, "/properties/p/items"),
        ({"anyOf": [{}, {"allOf": [bad]}]}, "/anyOf/1/allOf/0"),
        ({"prefixItems": [bad]}, "/prefixItems/0"),
        ({"additionalProperties": bad}, "/additionalProperties"),
        ({"$defs": {"d": bad}}, "/$defs/d"),
        ({"patternProperties": {"^a$": bad}}, "/patternProperties/^a$"),
    ]:
        error = refused(**of_schema(schema))
        assert repr(keyword) in error.message and place in error.message
        assert error.param == "response_format"
    lark = f"start: %json {json.dumps(bad)}"
    assert repr(keyword) in refused(guided_grammar=lark).message


def test_names_and_values_that_look_like_keywords_are_none(grammar_of):
    names = {"properties": {"not": {"const": {"not": 1}}}, "default": {"if": 1}, "x-order": 5}
    assert grammar_of(**of_schema(names)) and grammar_of(guided_json={"enum": [{"not": {}}]})


NESTED = "(" * 5000 + "a" + ")" * 5000


def deep(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


ENDLESS = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
BODIES = [
    # (body, part of the message)
    ({"response_format": 5}, "must be an object"),
    ({"response_format": {}}, "type must be"),
    ({"response_format": {"type": "xml"}}, "'xml'"),
    ({"response_format": {"type": ["text"]}}, "type must be"),
    ({"response_format": {"type": "structural_tag"}}, "'structural_tag'"),
    ({"response_format": {"type": "json_schema"}}, "json_schema must be an object with a schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "with a schema"),
    (of_schema(5), "with a schema"),
    (of_schema({}, flavour="x"), "json_schema.flavour is not supported"),
    ({"guided_json": 5}, "must be"),
    ({"guided_json": [SCHEMA]}, "a JSON schema"),
    ({"guided_json": "{"}, "guided_json is not valid"),
    ({"guided_json": "[" * 100_000}, "guided_json is not valid"),
    ({"guided_json": {"minimum": float("nan")}}, "guided_json is not valid"),
    ({"guided_json": {"maximum": float("inf")}}, "guided_json is not valid"),
    ({"guided_json": {"const": "\ud800"}}, "guided_json is not valid"),
    ({"guided_json": {"items": 5}}, "must be an object, or true or false"),
    ({"guided_json": {"items": [{}, {}]}}, "must be an object, or true or false"),
    ({"guided_json": {"anyOf": {}}}, "anyOf must be a list"),
    ({"guided_json": {"properties": []}}, "properties must be an object"),
    ({"guided_json": {"type": "integer", "exclusiveMinimum": True}}, "exclusiveMinimum must be"),
    ({"guided_json": {"type": "text"}}, "text"),
    ({"guided_json": {"type": 5}}, "type must be"),
    ({"guided_json": {"enum": []}}, "Unsatisfiable"),
    ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 2}}, "minimum (5)"),
    ({"guided_json": {"format": "postcode", "type": "string"}}, "postcode"),
    ({"guided_json": {"pattern": "(?=a)b", "type": "string"}}, "look-ahead"),
    ({"guided_json": {"pattern": "(", "type": "string"}}, "regex parse error"),
    ({"guided_json": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "oneOf"),
    (
        {"guided_json": {"minProperties": 1, "properties": {"a": {}, "b": {}}, "maxProperties": 1}},
        "",
    ),
    ({"guided_json": {"$ref": "http://example.com/a"}}, "http://example.com/a"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "/nowhere"),
    ({"guided_json": {"$ref": "#"}}, "no answer can satisfy it"),
    ({"guided_json": ENDLESS}, "no answer can satisfy it"),
    ({"guided_json": {"allOf": [{"$ref": "#"}]}}, "no answer can satisfy it"),
    ({"guided_json": deep(65)}, "nested more than 64"),
    ({"guided_json": deep(300)}, "nested more than 64"),
    ({"guided_json": {"enum": ["x" * 1_000_000]}}, "262144 is the limit"),
    ({"guided_json": {"type": "integer", "multipleOf": 1299709}}, "too complex"),
    ({"guided_regex": 5}, "or text"),
    ({"guided_regex": ["a"]}, "must be text"),
    ({"guided_regex": "("}, "unclosed group"),
    ({"guided_regex": r"(a)\1"}, "backreference"),
    ({"guided_regex": NESTED}, "guided_regex"),
    ({"guided_regex": "((a{1000}){1000}){1000}"}, "too complex"),
    ({"guided_regex": "x((a{1000}){1000}){1000}"}, "too complex"),
    ({"guided_regex": "\ud800"}, "guided_regex is not valid"),
    ({"guided_regex": "a" * 300_000}, "262144 is the limit"),
    ({"guided_choice": "a"}, "a list of texts"),
    ({"guided_choice": []}, "a list of texts"),
    ({"guided_choice": ["a", ""]}, "a list of texts"),
    ({"guided_choice": ["a", 5]}, "must be text"),
    ({"guided_choice": ["\udfff"]}, "guided_choice is not valid"),
    ({"guided_choice": ["x" * 1000] * 1000}, "262144 is the limit"),
    ({"guided_grammar": "once upon a time"}, "guided_grammar"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_grammar": "start: other"}, "other"),
    ({"guided_grammar": "start: " + NESTED}, "guided_grammar"),
    ({"guided_grammar": "root ::= (" * 500}, "guided_grammar"),
    ({"guided_grammar": 'start: <|nope|> "a"'}, "nope"),
    ({"guided_grammar": "start: text\ntext[temperature=0.5]: /.*/"}, "temperature"),
    ({"guided_grammar": '{"grammars": [{"json_schema": {"not": {}}}]}'}, "guided_grammar"),
    ({"guided_grammar": "x" * 300_000}, "262144"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "only one of"),
    ({"structured_outputs": {"json_object": True, "regex": "a"}}, "only one of"),
    ({"structured_outputs": {"json_object": "yes"}}, "json_object must be"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "disable_any_whitespace"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, "response_format and guided"),
    ({"guided_regex": "a", "ignore_eos": True}, "leave ignore_eos out"),
    ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids cannot"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=lambda value: str(value)[:60])
def test_bad_bodies_are_refused_with_their_field(refused, body, message):
    error = refused(**body)
    assert message in error.message and error.param in body
    assert len(error.message) < 400
    json.dumps(error.error)


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": {"type": "object", "properties": {"next": {"$ref": "#"}}}},
        {"guided_json": {"type": "string", "pattern": "(a+)+$"}},
        {"guided_regex": "(a|b)*a(a|b){20}"},
        {"guided_regex": "(a*)*b"},
        {"guided_json": {"type": "array", "minItems": 1_000_000}},
        {"guided_json": {"enum": [f"value {i}" for i in range(5000)]}},
    ],
    ids=lambda body: str(body)[:60],
)
def test_what_only_looks_dangerous_is_accepted(grammar_of, body):
    assert grammar_of(**body)


def test_a_grammar_that_takes_long_is_refused(refused, monkeypatch):
    monkeypatch.setattr(front_grammar, "TRIAL_S", 0.01)
    monkeypatch.setattr(front_grammar, "_problem", lambda *_: time.sleep(0.5) or "")
    assert "too complex" in refused(guided_regex="slow").message


def test_a_grammar_with_a_warning_is_not_accepted(llguidance_tokenizer):
    grammar = LLMatcher.grammar_from_json_schema('{"not": {}}', overrides={"lenient": True})
    assert "not" in front_grammar._problem(llguidance_tokenizer, grammar)


def test_a_grammar_is_tried_once(grammar_of, monkeypatch):
    grammar_of(guided_regex="tried once")
    monkeypatch.setattr(front_grammar, "_problem", lambda *_: "tried again")
    assert grammar_of(guided_regex="tried once")


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [(unigram, "differently"), (word_piece, "decoder"), (byte_fallback, None)],
)
def test_a_tokenizer_that_llguidance_does_not_read_as_we_do_is_refused(make, reason, model):
    ours = make().ours
    ours.json = make().backend.to_str()
    served = ServedModels.of((model, ours))
    body = {"prompt": "a", "guided_regex": "[a-z]+"}
    if reason is None:
        assert parse(COMPLETIONS, body, served, "me").samplings[0].grammar
        return
    with pytest.raises(BadRequest, match=f"not supported with this model.*{reason}"):
        parse(COMPLETIONS, body, served, "me")


def test_a_model_without_tokenizer_json_is_refused(tokenizer, model, byte_directory):
    other = Tokenizer.load(byte_directory)
    other.json = None
    with pytest.raises(BadRequest, match="guided_regex is not supported with this model"):
        body = {"prompt": "a", "guided_regex": "a"}
        parse(COMPLETIONS, body, ServedModels.of((model, other)), "me")


def test_a_model_without_end_tokens_is_refused(tokenizer, model):
    served = ServedModels.of((model, tokenizer))
    served.models["tiny"] = replace(served.models["tiny"], eos_ids=())
    with pytest.raises(BadRequest, match="needs a token that ends"):
        parse(COMPLETIONS, {"prompt": "a", "guided_regex": "a"}, served, "me")
    body = {"prompt": "a", "guided_regex": "a", "stop_token_ids": [7]}
    assert parse(COMPLETIONS, body, served, "me").samplings[0].grammar
