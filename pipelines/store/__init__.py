"""`SummaryStore`: summaries, embeddings and metadata of any number of pictures on disk, in a LanceDB table.

Needs the extra `store`: `pip install "fwd2bot[store]"`.
"""

from .indexing import IndexReport
from .summary_store import SummaryStore

__all__ = ["IndexReport", "SummaryStore"]
