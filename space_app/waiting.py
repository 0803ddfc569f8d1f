"""What waits in Gradio's queue, and is no longer wanted."""

from collections.abc import Callable
from typing import Any

from gradio.server_messages import ProcessCompletedMessage


async def drop_waiting(page: Any, session: str, function: int, unwanted: Callable[[list[Any]], bool]) -> None:
    """Take events of a session out of the queue and end them for its page, as Gradio does when one is cancelled.

    Gradio's own `cancels` of a listener would also end what the visitor asked for right after.

    Args:
        function: the index of the events' function in the page. unwanted: whether to drop one, from its inputs.
    """
    queue = page._queue
    for name, event in list(queue.event_ids_to_events.items()):
        if event.session_hash != session or event.fn._id != function or not unwanted(event.data.data):
            continue
        if event in queue.event_queue_per_concurrency_id[event.concurrency_id].queue:  # and is not served yet
            await queue.remove_from_queue(name)
            messages = queue.pending_messages_per_session.get(session)
            if messages is not None:
                messages.put_nowait(ProcessCompletedMessage(output={}, success=True, event_id=name))
