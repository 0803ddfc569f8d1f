"""LanceDB's errors of disks and object storage, in the words of this package."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DAMAGE = " A file of it is damaged or missing; restore it from a copy, or make the store anew."
# Lance's files never change, and are removed with the versions of the table that need them.
GONE = (
    " A file of it is missing. A purge or optimize of another process removes old versions, also those that are being "
    "read: open the store anew, and run the same call again. If that does not help, the store is damaged; restore it "
    "from a copy."
)
REMEDIES = {
    "Not found": GONE,
    "magic|fill whole buffer|too small|corrupt file|Invalid range": DAMAGE,
    "os error (13|30)": " The folder cannot be written to by this user.",
    "os error (27|28|122)": " The disk is full. What was committed before is there; make room and run the same call "
    "again.",
}
# Of object storage; LanceDB has some of them as `ValueError`.
REMOTE = 'Failed to connect to namespace|Generic { store: "|RetryError'
REMOTE_REMEDY = (
    " Is the bucket there, and do AWS_ENDPOINT, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say how to "
    "reach it? An endpoint with http:// needs AWS_ALLOW_HTTP=true."
)
# What is worth reading in such an error, which is several lines of Rust.
REASONS = (
    r"<Message>(.*?)</Message>",
    r"(Failed to get AWS credentials)",
    r'ConnectError\(".*?", (\S+, Os .*?message: ".*?")',
    r"source: (BadScheme)",
    r"(status: \d+)",
)


# What stands before the reason in an error about a filter: how LanceDB came upon it.
FILTER_STEPS = (
    r"(lance error: |Invalid input, |Invalid user input: |invalid SQL predicate: |Query Execution error: "
    r"|Error (parsing|resolving|applying) [^:]*: |Error during planning: |Schema error: |Arrow error: )+"
)


def reason_of(error: Exception) -> str:
    """The text of one of LanceDB's errors without the place in its source."""
    return re.sub(r",\s+/\S+\.rs:\d+(:\d+)?", "", str(error))


def filter_reason(error: Exception) -> str:
    """What is wrong with a filter, from LanceDB's error about it."""
    text = reason_of(error)
    parsed = re.search(r"sql parser error: (.*)\)\s*$", text, re.DOTALL)
    if parsed:  # of "(FILTER)"
        return re.sub(r"found: \)$", "found: its end", parsed[1])
    text = text.split(" Valid fields are ")[0]  # which our own message has
    return re.sub(rf"^{FILTER_STEPS}", "", text).strip().removesuffix(".")


@contextmanager
def store_errors(path: Any) -> Iterator[None]:
    """Errors of reading and writing as `OSError` that names the store."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = reason_of(error)
        is_remote = "://" in str(path) and re.search(REMOTE, text)
        if isinstance(error, ValueError) and not is_remote and "magic" not in text:
            raise
        if is_remote:
            found = (re.search(pattern, text, re.DOTALL) for pattern in REASONS)
            reason = next((one[1] for one in found if one), text.split(", location:")[0])
            remedy = REMOTE_REMEDY
        else:
            reason = text
            remedy = next((one for pattern, one in REMEDIES.items() if re.search(pattern, text)), "")
        raise OSError(f"The store {path} could not be read or written: {reason}.{remedy}") from error
