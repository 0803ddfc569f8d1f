"""What waits in Gradio's queue: how much of one visitor, and what is no longer wanted."""

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from gradio.server_messages import ProcessCompletedMessage

MAX_WAITING_OF_ONE = 4  # requests of one kind, of a session


def in_turn(follows: Callable[[list[Any], list[Any]], bool]) -> Callable[[Callable], Callable]:
    """Mark a handler of which one event of a session may need another to end first, see `keep_turns`.

    Args:
        follows: whether one does, from its inputs and those of the other.
    """

    def mark(handler: Callable) -> Callable:
        handler.follows = follows
        return handler

    return mark


def keep_turns(page: Any) -> None:
    """Leave in the queue what follows an event that is being served, so that it takes no place from other sessions.

    One that repeats the event before it is served: its handler knows what to do with it.
    """
    queue, get_events = page._queue, page._queue.get_events

    def get_events_in_turn() -> Any:
        before = [event for job in queue.active_jobs for event in job or ()]
        left = {}
        for name, waits in queue.event_queue_per_concurrency_id.items():
            left[name], waits.queue = waits.queue, []
            for event in left[name]:
                if not _must_wait(event, [one for one in before if _is_alike(event, one)]):
                    waits.queue.append(event)
                before.append(event)
        found = get_events()
        taken = found[0] if found else []
        for name, events in left.items():
            queue.event_queue_per_concurrency_id[name].queue = [event for event in events if event not in taken]
        return found

    queue.get_events = get_events_in_turn


def _is_alike(event: Any, other: Any) -> bool:
    return (event.session_hash, event.fn._id) == (other.session_hash, other.fn._id)


def _must_wait(event: Any, before: list[Any]) -> bool:
    follows = getattr(event.fn.fn, "follows", None)
    if follows is None or not before or event.data.data == before[-1].data.data:
        return False
    return any(follows(event.data.data, one.data.data) for one in before)


def bound_waiting(page: Any, concurrency_id: str) -> None:
    """Refuse what a session asks for while so much of its kind waits, so that one visitor leaves room for others.

    Args:
        concurrency_id: of the events that count.
    """
    queue, push = page._queue, page._queue.push

    async def push_bounded(body: Any, request: Any, username: str | None) -> Any:
        waits = queue.event_queue_per_concurrency_id.get(concurrency_id)
        counts = body.fn_index in page.fns and page.fns[body.fn_index].concurrency_id == concurrency_id
        if waits is not None and counts:
            asked = (body.session_hash, body.fn_index)
            waiting = sum((event.session_hash, event.fn._id) == asked for event in waits.queue)
            if waiting >= MAX_WAITING_OF_ONE:
                words = f"{waiting} of your requests of this kind wait already. Wait until one of them is served."
                raise HTTPException(429, words)
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
