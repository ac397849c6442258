"""Checked values of a config.json: each function raises a ValueError that names the key."""

from collections.abc import Mapping
from typing import Any

from mellmpi.models.model_files import short

Config = Mapping[str, Any]

LARGEST_SIZE = 2**31 - 1


def size(config: Config, key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    """A whole number from 1 to `most`; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} must be a whole number from 1 to {most}, not {short(value)}")
    return value


def number(
    config: Config, key: str, default: float | None = None, least: float = 1e-9, most: float = 1e9
) -> float:
    """A number from `least` to `most`, not converted; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return value  # not NaN
    raise ValueError(f"{key} must be a number from {least:g} to {most:g}, not {short(value)}")


def flag(config: Config, key: str, default: bool = False) -> bool:
    """true or false; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, not {short(value)}")
    return value


def section(config: Config, key: str) -> dict[str, Any]:
    """A copy of an object within the config; empty where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object {{…}}, not {short(value)}")
    return dict(value)


def token_id(config: Config, key: str) -> int | None:
    """Any whole number, or null: a token id that is not used in steps."""
    value = config.get(key)
    if value is not None and type(value) is not int:
        raise ValueError(f"{key} must be a token id or null, not {short(value)}")
    return value


def token_ids(config: Config, key: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids below `vocab_size`: one number in the config, a list or null."""
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for each in ids:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise ValueError(
                f"{key} must be token ids from 0 to {vocab_size - 1} (vocab_size - 1), "
                f"not {short(value)}"
            )
    return tuple(ids)
