"""Hooks of schemathesis: more of the valid bodies are such as this server can answer."""

import schemathesis

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST = 50  # tokens


@schemathesis.hook
def map_body(context, body):
    """A body that is as valid as the given one."""
    if not isinstance(body, dict):
        return body
    body = with_integers(body)
    for name in LIMITS:
        if type(body.get(name)) is int:
            body[name] = min(body[name], MOST)
    return body | ({"model": "tiny"} if isinstance(body.get("model"), str) else {})


def with_integers(value):
    """The value with 1 for 1.0: to a schema both are integers, to the server one is."""
    if isinstance(value, dict):
        return {name: with_integers(child) for name, child in value.items()}
    if isinstance(value, list):
        return [with_integers(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
