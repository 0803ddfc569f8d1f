"""What the real indexing processes of the tests run. They are forked from a server that has imported the slow part."""

import ctypes
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor


def index(
    pipe: Connection, checkpoint: Any, path: Any, folder: Any, commit_every: int, superuser: bool, accelerator: bool
) -> None:
    """Load the model, say "ready", wait for a word, index, and say how it went.

    Args:
        accelerator: go the way of a model on one, which prepares each batch while the one before is computed.
    """
    if not superuser:
        give_up_writing_everywhere()  # before there are other threads, which would keep the right
    from fwd2bot.pipelines.store import SummaryStore  # LanceDB has threads, which no fork would take along
    from fwd2bot.pipelines.store.compressor import Compressor

    if accelerator:
        Compressor.is_on_cpu = False

    torch.set_num_threads(1)
    model = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint)
    processor = Fwd2BotProcessor.from_pretrained(checkpoint)
    pipe.send("ready")
    pipe.recv()
    start = time.perf_counter()
    try:
        store = SummaryStore.create(path, model, processor, codec="fp16", exist_ok=True)
        # One picture at a time, so that the same numbers come out whatever the batches of an undisturbed run are.
        report = store.add(folder, batch_size=1, commit_every=commit_every, progress=False)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise
    counts = (report.added, report.updated, report.duplicates, report.skipped, len(report.failed))
    pipe.send((*counts, time.perf_counter() - start))


def give_up_writing_everywhere() -> None:
    """The superuser writes into read-only folders, too, unless this right (CAP_DAC_OVERRIDE) is taken from it."""
    if os.geteuid() == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        system = ctypes.CDLL(None, use_errno=True)
        assert system.capget(header, data) == 0
        data[0] &= ~(1 << 1)  # effective
        data[1] &= ~(1 << 1)  # permitted
        assert system.capset(header, data) == 0, os.strerror(ctypes.get_errno())
