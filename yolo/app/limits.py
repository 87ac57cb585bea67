"""What an app for strangers does not do: wait for one of them alone, or print what they wrote.

Gradio limits its whole queue; here an address gets a part of it. And where Gradio, Uvicorn or
asyncio would print a traceback, with the values of the call in it, the log gets one escaped line.
"""

import logging
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
from fastapi import Request
from gradio import queueing, routes, utils

from yolo.errors import one_line

WAITING_CALLS = 64  # of everybody; further ones are told to try again, instead of waiting long
CALLS_OF_ADDRESS = 16  # of these, waiting or at work: a class behind one router, not one script
LOGGERS = ("uvicorn.error", "asyncio")


def limit(page: gr.Blocks) -> None:
    """Limit the calls that wait, in all and from each address; calls past the queue are refused."""
    page.queue(max_size=WAITING_CALLS, default_concurrency_limit=2, api_open=False)
    queue = page._queue
    push = queue.push

    async def push_within_limit(body: Any, request: Request, username: str | None) -> Any:
        address = address_of(request)
        calls = [address_of(event.request) for event in queue.event_ids_to_events.values()]
        if calls.count(address) >= CALLS_OF_ADDRESS:
            why = f"{CALLS_OF_ADDRESS} calls from your address are waiting. Please try again later."
            return False, why, "queue_full"
        return await push(body, request, username)

    queue.push = push_within_limit  # type: ignore[method-assign, assignment]


def address_of(request: Request) -> str:
    """Return who calls: on a Space, where everybody comes through a proxy, as the proxy says."""
    forwarded = request.headers.get("x-forwarded-for") if "SPACE_ID" in os.environ else None
    if forwarded:
        return forwarded.split(",")[0].strip()
    return request.client.host if request.client else ""


def log_in_one_line() -> None:
    """Let a call that fails leave one line in the log, whatever it was called with."""
    quiet = ModuleType("traceback")
    vars(quiet).update(vars(traceback), print_exc=_print_error)
    for module in (queueing, routes, utils):
        module.traceback = quiet  # type: ignore[attr-defined]
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_shorten)


def error_line(error: BaseException) -> str:
    """Return an error as one line: where it was raised, its kind, and what it says, escaped."""
    steps = traceback.extract_tb(error.__traceback__)
    where = f"{Path(steps[-1].filename).name}:{steps[-1].lineno}: " if steps else ""
    return one_line(f"{where}{type(error).__name__}: {error}")


def _print_error() -> None:
    error = sys.exc_info()[1]
    if error is not None:
        print(f"a call failed: {error_line(error)}", file=sys.stderr, flush=True)


def _shorten(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if record.exc_info and record.exc_info[1]:
        text = f"{text.strip()}: {error_line(record.exc_info[1])}"
    record.msg, record.args, record.exc_info, record.exc_text = one_line(text), (), None, None
    return True
