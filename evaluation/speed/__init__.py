"""How long a decode step and a token of `generate` take, beside the competitors, in one run."""

from .command import add_commands, measure

__all__ = ["add_commands", "measure"]
