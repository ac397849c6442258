"""The forms in which models write tool calls, found from their chat templates."""

import re
from dataclasses import dataclass

from mellmpi.frontend.items import Markup
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.tools import Tools

REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a model writes calls, each a JSON object with a name and arguments."""

    before: str = ""  # each block of calls
    after: str = ""
    bare: bool = False  # calls may begin an answer without `before`
    arguments: str = "arguments"  # their key
    between: str = "\n"  # blocks, or calls in a list
    listed: bool = False  # one block, a list of calls
    in_template: bool = True  # the template tells the model of its tools
    short_ids: bool = False  # the template takes ids of nine letters and digits only


HERMES = ToolFormat(before="<tool_call>", after="</tool_call>")
LLAMA_3 = ToolFormat(before="<|python_tag|>", bare=True, arguments="parameters", between="; ")
MISTRAL = ToolFormat(before="[TOOL_CALLS]", listed=True, between=", ", short_ids=True)
PLAIN_JSON = ToolFormat(bare=True, in_template=False)


def tool_format(template: str) -> ToolFormat:
    """Return the format of the models that this chat template is for."""
    if "tools" not in template:
        return PLAIN_JSON
    if HERMES.before in template and "<function=" not in template:
        return HERMES
    if MISTRAL.before in template and "[ARGS]" not in template:
        return MISTRAL
    if LLAMA_3.before in template or re.search(r'"parameters\\?": dictionary', template):
        return LLAMA_3
    return PLAIN_JSON


def markup_of(tokenizer: Tokenizer, tools: Tools | None, prompt: list[int]) -> Markup | None:
    """Return what marks the items of the answer to a prompt; None: all of it is text."""
    template = tokenizer.template
    reasoning = next((marks for marks in REASONING if marks[1] in template), None)
    if tools is None and reasoning is None:
        return None
    inside = reasoning is not None and tokenizer.ends_with(prompt, reasoning[0])
    if tools is None:
        return Markup(reasoning=reasoning, in_reasoning=inside)
    form = tool_format(template)
    return Markup(
        reasoning=reasoning,
        in_reasoning=inside,
        calls=True,
        before_calls=form.before,
        after_calls=form.after,
        bare=form.bare,
        names=tools.names if form.bare else None,
        parallel=tools.parallel,
        short_ids=form.short_ids,
    )
