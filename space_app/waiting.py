"""What waits in Gradio's queue: how much of one visitor, in which order, and what is no longer wanted."""

import re
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from gradio.context import LocalContext
from gradio.server_messages import ProcessCompletedMessage

MAX_WAITING_OF_ONE = 4  # requests of one kind, of a session
MAX_WAITING_IN_ALL = 8  # of all kinds, of a session
SESSION = re.compile("[A-Za-z0-9_-]{1,64}")  # as the page and `gradio_client` make them


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
            waiting = [event.fn._id for event in waits.queue if event.session_hash == body.session_hash]
            alike = waiting.count(body.fn_index)
            if alike >= MAX_WAITING_OF_ONE or len(waiting) >= MAX_WAITING_IN_ALL:
                words = f"{alike} of your requests of this kind wait already, and {len(waiting)} in all. Wait until "
                raise HTTPException(429, words + "one of them is served.")
        return await push(body, request, username)

    queue.push = push_bounded


def keep_going(page: Any) -> None:
    """Keep the queue from what would end it for all, or fill it for ever.

    It ends with its own error when it does not know the session of something that waits: one with an empty name, which
    is refused here with others that Gradio would split, or the oldest one of too many. And it keeps an event that is
    cancelled twice.
    """
    queue, send, push = page._queue, page._queue.send_message, page._queue.push

    def send_if_known(event: Any, message: Any) -> None:
        if event.session_hash in queue.pending_messages_per_session:
            send(event, message)

    async def push_known(body: Any, request: Any, username: str | None) -> Any:
        if body.session_hash is not None and not SESSION.fullmatch(body.session_hash):
            words = f"session_hash must be 1 to 64 letters, digits, - or _, not {body.session_hash[:64]!a}."
            raise HTTPException(400, f"{words} Give such a one, or none.")
        for name in set(queue.event_ids_to_events) - not_ended(queue):
            del queue.event_ids_to_events[name]
        return await push(body, request, username)

    queue.send_message, queue.push = send_if_known, push_known


def in_turn(
    follows: Callable[[list[Any], list[Any]], bool], drops_repeats: bool = False
) -> Callable[[Callable], Callable]:
    """Mark a handler of which one event of a session may need an earlier one to end first, see `keep_turns`.

    Args:
        follows: whether one does, from its inputs and those of the earlier one.
        drops_repeats: whether an event with the inputs of the one before it, which waits or is served, is left out.
    """

    def mark(handler: Callable) -> Callable:
        handler.follows, handler.drops_repeats = follows, drops_repeats
        return handler

    return mark


def keep_turns(page: Any) -> None:
    """Leave in the queue what follows an earlier event until that has ended; it takes no place from other sessions."""
    queue, push, get_events = page._queue, page._queue.push, page._queue.get_events
    awaited: dict[str, set[str]] = {}  # the ids of the events that one which is kept back follows

    async def push_in_turn(body: Any, request: Any, username: str | None) -> Any:
        function = page.fns.get(body.fn_index)
        follows = getattr(function and function.fn, "follows", None)
        if follows is None:
            return await push(body, request, username)
        if len(body.data) != len(function.inputs):
            raise HTTPException(400, f"{len(function.inputs)} inputs are needed, got {len(body.data)}.")
        done, name, told = await push(body, request, username)
        if done:
            event = queue.event_ids_to_events[name]
            earlier = _earlier(queue, event)
            if function.fn.drops_repeats and earlier and earlier[-1].data.data == body.data:
                await _end(queue, event)
            elif before := {one._id for one in earlier if follows(body.data, one.data.data)}:
                awaited[name] = before
        return done, name, told

    def get_events_in_turn() -> Any:
        if not awaited:
            return get_events()
        here = not_ended(queue)
        for name in list(awaited):
            awaited[name].intersection_update(here)
            if name not in here or not awaited[name]:
                del awaited[name]
        found, all_events = None, {name: waits.queue for name, waits in queue.event_queue_per_concurrency_id.items()}
        try:
            for name, events in all_events.items():
                ready = [event for event in events if event._id not in awaited]
                queue.event_queue_per_concurrency_id[name].queue = ready
            found = get_events()
        finally:
            taken = found[0] if found else []
            for name, events in all_events.items():
                queue.event_queue_per_concurrency_id[name].queue = [event for event in events if event not in taken]
        return found

    queue.push, queue.get_events = push_in_turn, get_events_in_turn


def _earlier(queue: Any, this: Any) -> list[Any]:
    """The events of the same session and function that came before one and have not ended, in their order."""
    here = not_ended(queue)
    found = []
    for event in queue.event_ids_to_events.values():
        if event is this:
            break
        if (event.session_hash, event.fn._id) == (this.session_hash, this.fn._id) and event._id in here:
            found.append(event)
    return found


def not_ended(queue: Any) -> set[str]:
    """The ids of the events that wait or are served; Gradio's own list keeps one that is cancelled twice for ever."""
    waiting = [waits.queue for waits in queue.event_queue_per_concurrency_id.values()]
    return {event._id for events in [*waiting, *queue.active_jobs] for event in events or ()}


def asked_at(page: Any) -> float | None:
    """When what a handler serves just now came into the queue, by `time.monotonic`; None outside of one."""
    event = page._queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    return None if event is None else event.enqueue_time


async def drop_waiting(page: Any, session: str, function: int, unwanted: Callable[[list[Any]], bool]) -> None:
    """Take events of a session out of the queue and end them for its page, as Gradio does when one is cancelled.

    Gradio's own `cancels` of a listener would also end what the visitor asked for right after.

    Args:
        function: the index of the events' function in the page. unwanted: whether to drop one, from its inputs.
    """
    queue = page._queue
    for event in list(queue.event_ids_to_events.values()):
        if event.session_hash == session and event.fn._id == function and unwanted(event.data.data):
            await _end(queue, event)


async def _end(queue: Any, event: Any) -> None:
    """Take an event out of the queue, unless it is served or has ended already, and end it for its page."""
    if event in queue.event_queue_per_concurrency_id[event.concurrency_id].queue:
        await queue.remove_from_queue(event._id)
        messages = queue.pending_messages_per_session.get(event.session_hash)
        if messages is not None:
            messages.put_nowait(ProcessCompletedMessage(output={}, success=True, event_id=event._id))
