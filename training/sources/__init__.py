"""Data sets as they lie around, as training batches: readers, the mixture, labels, collators."""

from .collators import SourceBackboneCollator, SourceCollator
from .conversations import ConversationEncoder, EncodedConversation
from .mixture import Source, SourceMixture, UnusableRowsError
from .rows import MalformedRowError, RowReader
from .run import open_sources, run_mixture, texts_of
from .samples import SamplePreparer, content_hash

__all__ = [
    "ConversationEncoder",
    "EncodedConversation",
    "MalformedRowError",
    "RowReader",
    "SamplePreparer",
    "Source",
    "SourceBackboneCollator",
    "SourceCollator",
    "SourceMixture",
    "UnusableRowsError",
    "content_hash",
    "open_sources",
    "run_mixture",
    "texts_of",
]
