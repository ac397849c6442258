"""Byte tokenizers with the chat templates of models that call tools or reason."""

import json
from dataclasses import dataclass

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mellmpi.models.random_model import write_byte_tokenizer

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "{% endif %}"
    + TURNS.replace(
        "CALL",
        '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}\n</tool_call>",
    )
)
THINKING = (
    HERMES + "{% if enable_thinking is not defined %}<think>\n{% else %}{# </think> #}{% endif %}"
)
LLAMA_3 = (
    '{% if tools %}Answer {"name": function name, "parameters": dictionary}{{ tools | tojson }}'
    "{% endif %}<|python_tag|>" + TURNS.replace("CALL", "{{ call | tojson }}")
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + TURNS.replace(
        "CALL",
        "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
        "[TOOL_CALLS][{{ call.function | tojson }}]",
    )
)


@dataclass(frozen=True)
class Model:
    """One model: how calls are written, and what comes between them."""

    template: str | None  # None: the tokenizer's own, without tools
    special: tuple[str, ...]
    around: tuple[str, str]
    arguments: str = "arguments"
    between: str = ""

    def call(self, name, arguments):
        """The text of one call."""
        body = json.dumps({"name": name, self.arguments: arguments})
        return f"{self.around[0]}{body}{self.around[1]}"


MODELS = {
    "hermes": Model(
        HERMES, ("<tool_call>", "</tool_call>"), ("<tool_call>\n", "\n</tool_call>"), between="\n"
    ),
    "hermes as text": Model(HERMES, (), ("<tool_call>\n", "\n</tool_call>"), between="\n"),
    "thinking": Model(
        THINKING,
        ("<think>", "</think>"),
        ("<tool_call>\n", "\n</tool_call>"),
        between="\n",
    ),
    "thinking as text": Model(THINKING, (), ("<tool_call>\n", "\n</tool_call>"), between="\n"),
    "llama": Model(LLAMA_3, ("<|python_tag|>",), ("", ""), "parameters", between="; "),
    "mistral": Model(MISTRAL, ("[TOOL_CALLS]",), ("[TOOL_CALLS][", "]")),
    "plain": Model(None, (), ("", ""), between="\n"),
}


def write_model(model, directory):
    """Write the tokenizer of a model."""
    write_byte_tokenizer(512, directory)
    file = directory / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.add_special_tokens([AddedToken(name, special=True) for name in model.special])
    backend.save(str(file))
    if model.template is not None:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["chat_template"] = model.template
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
