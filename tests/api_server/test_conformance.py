"""The OpenAPI document says what the server does."""

import pytest

from mellmpi.frontend.dialects import FIELDS
from mellmpi.frontend.http.answer_schemas import ANSWERS, OTHER_ANSWERS
from mellmpi.frontend.http.app import make_app
from mellmpi.frontend.http.schemas import BODIES, SCHEMAS
from tests.api_server.fuzz import EXAMPLES


@pytest.fixture(scope="module")
def document():
    return make_app(None).openapi()


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_schema(path):
    assert set(SCHEMAS[path]) == set(FIELDS[path].known)


def test_every_route_has_its_answers(document):
    paths = document["paths"]
    assert set(paths) == ANSWERS.keys() | OTHER_ANSWERS.keys()
    for path, operations in paths.items():
        for operation in operations.values():
            assert {"200", "400", "401", "404", "429", "503"} < set(operation["responses"]), path
    described = {path for path in paths if "requestBody" in paths[path].get("post", {})}
    assert described == BODIES.keys() | {"/v1/files"}


def test_the_documents_schemas_are_schemas(document):
    jsonschema = pytest.importorskip("jsonschema")
    for path, schema in (BODIES | ANSWERS).items():
        jsonschema.Draft202012Validator.check_schema(schema)
        if path in EXAMPLES and path in BODIES:
            jsonschema.validate(EXAMPLES[path], BODIES[path])


def test_the_server_does_what_its_document_says(tmp_path, byte_directory):
    pytest.importorskip("schemathesis")
    from tests.api_server.conformance import run

    code, output = run(byte_directory, "--phases", "fuzzing", "--max-examples", "10")
    assert code == 0, output
