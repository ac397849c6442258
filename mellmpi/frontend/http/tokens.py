"""Bodies of /tokenize."""

from typing import Any

from mellmpi.frontend.openai import CHAT, COMPLETIONS, parse
from mellmpi.frontend.served import ServedModels


def tokenized(body: dict[str, Any], served: ServedModels) -> dict[str, Any]:
    """Return the token ids of a prompt, or of the messages of a chat. Raises BadRequest."""
    url = CHAT if "messages" in body else COMPLETIONS
    call = parse(url, {**body, "max_tokens": 1}, served, "tokenize")
    tokens = list(call.prompts[0])
    limit = served.models[call.model].max_model_len
    return {"count": len(tokens), "max_model_len": limit, "tokens": tokens}
