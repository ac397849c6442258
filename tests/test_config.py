"""The configuration: immutable, checked once, broadcast as plain data."""

import dataclasses

import msgpack
import pytest

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig, Config, ModelConfig

SECTIONS = (ModelConfig, CacheConfig, BatchConfig, ClusterConfig)


def test_the_defaults_are_valid_and_survive_the_broadcast():
    config = Config()
    assert Config.from_dict(msgpack.unpackb(msgpack.packb(config.to_dict()))) == config


def test_values_other_than_defaults_survive_the_broadcast():
    config = Config(
        models=(ModelConfig(model="x", dtype="float32"), ModelConfig(model="y")),
        worker_models=(("x",), ("x", "y")),
        batch=BatchConfig(max_num_seqs=3),
        cache=CacheConfig(block_size=8),
        cluster=ClusterConfig(policy="best_fit"),
        threads=2,
    )
    back = Config.from_dict(config.to_dict())
    assert back == config and type(back.batch) is BatchConfig


def test_settings_are_immutable():
    for section in [Config(), *(make() for make in SECTIONS)]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)


@pytest.mark.parametrize(
    ("section", "values", "option"),
    [
        (ModelConfig, {"dtype": "float16"}, "--dtype"),
        (ModelConfig, {"max_model_len": 0}, "--max-model-len"),
        (CacheConfig, {"block_size": 0}, "--block-size"),
        (CacheConfig, {"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        (CacheConfig, {"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        (BatchConfig, {"max_num_seqs": 0}, "--max-num-seqs"),
        (BatchConfig, {"max_num_seqs": 9, "max_num_batched_tokens": 8}, "--max-num-batched-tokens"),
        (ClusterConfig, {"migrate": "always"}, "--migrate"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_option(section, values, option):
    with pytest.raises(ValueError, match=option):
        section(**values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelConfig, {"max_model_len": 1}),
        (CacheConfig, {"block_size": 1, "gpu_memory_utilization": 1.0}),
        (BatchConfig, {"max_num_seqs": 1, "max_num_batched_tokens": 1}),
        (ClusterConfig, {"migrate": "never"}),
    ],
)
def test_the_edges_are_allowed(section, values):
    section(**values)


def test_a_model_is_served_under_its_own_name_or_another():
    assert ModelConfig(model="m").name == "m"
    assert ModelConfig(model="m", served_model_name="n").name == "n"


A, B = ModelConfig(model="a"), ModelConfig(model="b")


def test_every_worker_hosts_every_model_unless_told_otherwise():
    assert Config(models=(A, B)).hosted(3) == ("a", "b")


def test_workers_take_the_sets_of_models_in_turn_and_begin_again():
    config = Config(models=(A, B), worker_models=(("a",), ("a", "b")))
    assert [config.hosted(w) for w in (1, 2, 3)] == [("a",), ("a", "b"), ("a",)]


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"models": (A, A)}, "--served-model-name"),
        ({"models": (A, ModelConfig(model="b", served_model_name="a"))}, "--served-model-name"),
        (
            {"models": (A, B), "worker_models": (("a",), ("c",))},
            "--worker-models c: there are",
        ),
        ({"models": (ModelConfig(model="a", chat_template="t"), B)}, "--chat-template"),
    ],
)
def test_ambiguous_or_unknown_models_are_refused(values, hint):
    with pytest.raises(ValueError, match=hint):
        Config(**values)
