"""A model directory with any damage is served, or refused with the name of a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.models import Architecture, attention_factor, inv_freq, resolve
from tests.models import model_directories as models
from tests.models.refusals import POINTER

ANYTHING = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, float("nan"), "", "x", [], [1], [None], {}, {"a": 1}, [[2]]]
)


def damage(file: Path, draw: Callable) -> None:
    """Truncate `file`, change some of its bytes, replace its content, or remove it."""
    whole, kind = file.read_bytes(), draw(st.sampled_from(["cut", "flip", "replace", "remove"]))
    if kind == "remove":
        file.unlink()
    elif kind == "replace":
        file.write_bytes(draw(st.sampled_from([b"", POINTER.encode(), b"[]", b"{}", b"\xff\xfe"])))
    elif kind == "cut":
        file.write_bytes(whole[: draw(st.integers(0, len(whole) - 1))])
    else:
        changed = bytearray(whole)
        for place in draw(st.lists(st.integers(0, min(len(whole), 2000) - 1), min_size=1)):
            changed[place] = draw(st.integers(0, 255))
        file.write_bytes(changed)


def rewrite(file: Path, draw: Callable) -> None:
    """Remove a key of a JSON file, or change its value."""
    given = json.loads(file.read_bytes())
    key = draw(st.sampled_from([*given, "rope_scaling", "head_dim", "sliding_window"]))
    if draw(st.booleans()):
        given.pop(key, None)
    else:
        given[key] = draw(ANYTHING)
    file.write_text(json.dumps(given))


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_a_damaged_directory_is_served_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    model = models.write_model(folder / "m")
    if data.draw(st.booleans()):
        models.write_shards(model, 2)
    whole = st.sampled_from(sorted(model.iterdir()))
    for file in data.draw(st.lists(whole, min_size=1, max_size=2, unique=True)):
        is_json = file.name in ("config.json", "generation_config.json")
        (rewrite if is_json and data.draw(st.booleans()) else damage)(file, data.draw)
    try:
        assert resolve(str(model), folder / "cache") == model
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    else:
        inv_freq(Architecture.from_directory(model))
    shutil.rmtree(folder)


VALUES = st.one_of(ANYTHING, st.floats(1e-9, 1e9), st.integers(1, 10**9))
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default"])},
    optional=dict.fromkeys(
        [
            "factor",
            "rope_theta",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "original_max_position_embeddings",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        ],
        VALUES,
    ),
)


@settings(deadline=None, max_examples=1000)
@given(rope=ROPE, theta=VALUES)
def test_rotary_frequencies_of_every_accepted_config_are_finite(rope, theta):
    try:
        arch = Architecture.from_hf({**models.CONFIG, "rope_theta": theta, "rope_scaling": rope})
    except ValueError:
        return
    assert np.isfinite(inv_freq(arch)).all() and np.isfinite(attention_factor(arch))
