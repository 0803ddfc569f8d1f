"""Tiny real models of many families of vision-language models, with their real processors, built in memory.

Every builder gives a random model of the family's own class, a few layers of width 32 in float32 and evaluation mode,
and the processor of the same family, on a byte-level tokenizer that has the family's special tokens and a chat
template that puts the picture where the family's own does. Nothing is read from disk or from the network.
"""

from . import gemma_families, llava_families, mrope_families, tile_families  # noqa: F401, they register themselves
from .tiny_parts import FAMILIES, FILLED_UP, PADDED, SCALED, TIED, build, conversation, merged_token_id, pictures

__all__ = ["FAMILIES", "FILLED_UP", "PADDED", "SCALED", "TIED", "build", "conversation", "merged_token_id", "pictures"]
