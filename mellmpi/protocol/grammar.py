"""Limits of grammars, equal in the front, which tries them, and in the workers."""

from typing import Any, Final

GRAMMAR_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Arguments of llguidance's `LLParserLimits`. A mask of an evil regex then takes 0.2 s, not 2 s."""
