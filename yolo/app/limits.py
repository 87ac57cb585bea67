"""What an app for strangers does not do: wait for one of them alone, or print what they wrote.

Gradio limits its whole queue; here an address gets a part of it. And where Gradio, Uvicorn or
asyncio would print a traceback, with the values of the call in it, the log gets one escaped line.
"""

import logging
import os
import sys
import traceback
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
from fastapi import Request
from gradio import queueing, routes, utils

from yolo.errors import one_line

WAITING_CALLS = 64  # of everybody; further ones are told to try again, instead of waiting long
CALLS_OF_ADDRESS = 32  # waiting or at work: a class behind one router; opening the page makes two
LOGGERS = ("uvicorn.error", "asyncio")


def limit(page: gr.Blocks) -> None:
    """Limit the calls that wait, in all and from each address; nothing is done past the queue."""
    page.queue(max_size=WAITING_CALLS, default_concurrency_limit=2, api_open=False)
    queue = page._queue
    push = queue.push

    async def push_within_limit(body: Any, request: Request, username: str | None) -> Any:
        address = address_of(request)
        waiting = [e for line in queue.event_queue_per_concurrency_id.values() for e in line.queue]
        at_work = [event for events in queue.active_jobs for event in events or ()]
        calls = [address_of(event.request) for event in (*waiting, *at_work)]
        if calls.count(address) >= CALLS_OF_ADDRESS:
            why = f"{CALLS_OF_ADDRESS} calls from your address are waiting. Please try again later."
            return False, why, "queue_full"
        return await push(body, request, username)

    queue.push = push_within_limit  # type: ignore[method-assign, assignment]
    # of screen recordings, for which it starts FFmpeg on whatever anybody sends
    routes.process_video_with_ffmpeg = _refuse_recording  # type: ignore[assignment]


async def _refuse_recording(*_: Any) -> Any:
    raise gr.Error("Recordings are not edited here.", print_exception=False)


def address_of(request: Request) -> str:
    """Return who calls: an address, or the network of 64 bits that a person has in IPv6.

    On a Space everybody comes through proxies. Each appends whom it was called by, so of the
    addresses that they name the last public one is true: what a caller wrote stands before it.
    """
    host = request.client.host if request.client else ""
    if "SPACE_ID" in os.environ:
        named = request.headers.get("x-forwarded-for", "").split(",")
        host = next((name.strip() for name in reversed(named) if _is_public(name.strip())), host)
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return host
    if isinstance(address, IPv6Address) and not address.ipv4_mapped:
        return str(ip_network((address, 64), strict=False))
    return host


def _is_public(name: str) -> bool:
    try:
        return ip_address(name).is_global
    except ValueError:
        return False


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
