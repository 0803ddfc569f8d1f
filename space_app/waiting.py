"""What waits in Gradio's queue: how much of one visitor, and what is no longer wanted."""

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from gradio.server_messages import ProcessCompletedMessage

MAX_WAITING_OF_ONE = 4  # of a session, for the model


def bound_waiting(page: Any, concurrency_id: str) -> None:
    """Refuse what a session asks for while so much of it waits already, so that one visitor leaves room for others.

    Args:
        concurrency_id: of the events that count.
    """
    queue, push = page._queue, page._queue.push

    async def push_bounded(body: Any, request: Any, username: str | None) -> Any:
        waits = queue.event_queue_per_concurrency_id.get(concurrency_id)
        counts = body.fn_index in page.fns and page.fns[body.fn_index].concurrency_id == concurrency_id
        if waits is not None and counts:
            waiting = sum(event.session_hash == body.session_hash for event in waits.queue)
            if waiting >= MAX_WAITING_OF_ONE:
                raise HTTPException(429, f"{waiting} of your requests wait already. Wait until one of them is served.")
        return await push(body, request, username)

    queue.push = push_bounded


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
