"""What is taken out of the queue, without a server."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from fwd2bot.space_app.waiting import drop_waiting


class Queue:
    """As much of Gradio's queue as `drop_waiting` sees; `ends` is what ends while another event is taken out."""

    def __init__(self, count, ends):
        self.events = [
            SimpleNamespace(
                _id=str(number),
                session_hash="one",
                concurrency_id="model",
                fn=SimpleNamespace(_id=7),
                data=SimpleNamespace(data=[number]),
            )
            for number in range(count)
        ]
        self.event_ids_to_events = {event._id: event for event in self.events}
        self.event_queue_per_concurrency_id = {"model": SimpleNamespace(queue=list(self.events))}
        self.pending_messages_per_session = {"one": asyncio.Queue()}
        self.ends = ends

    async def remove_from_queue(self, name):
        for one in (name, self.ends):
            event = self.event_ids_to_events.pop(one, None)
            if event is not None:
                self.event_queue_per_concurrency_id["model"].queue.remove(event)


def test_event_that_ends_while_others_are_dropped_is_left_alone():
    queue = Queue(3, ends="1")
    dropped = drop_waiting(SimpleNamespace(_queue=queue), "one", 7, lambda inputs: inputs[0] < 2)
    with ThreadPoolExecutor(1) as pool:  # this thread may have Playwright's loop
        pool.submit(asyncio.run, dropped).result()
    assert [event._id for event in queue.event_queue_per_concurrency_id["model"].queue] == ["2"]
    told = queue.pending_messages_per_session["one"]
    assert told.qsize() == 1 and told.get_nowait().event_id == "0"
