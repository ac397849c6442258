"""A few of the fuzzer's bodies, on every run of the tests."""

from tests.api_server.fuzz import run


def test_mutated_bodies_do_no_harm(byte_directory):
    answers = run(byte_directory, 300, seed=0)
    assert sum(answers.values()) == 300
    assert sum(count for (_, status), count in answers.items() if status == 200) > 10
