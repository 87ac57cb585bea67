"""What strangers may ask of a served page, over HTTP, and what that leaves in the log."""

import logging
import threading
from collections.abc import Iterator

import gradio as gr
import httpx
import pytest
from fastapi import Request

from yolo.app import limits

FORGED = "x\n\x1b[31merror: all weights deleted\x1b[0m"


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shorten what is logged, for this test alone."""
    for module in (limits.queueing, limits.routes, limits.utils):
        monkeypatch.setattr(module, "traceback", module.traceback)
    limits.log_in_one_line()
    yield
    for name in limits.LOGGERS:
        logging.getLogger(name).removeFilter(limits._shorten)


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def url(gate: threading.Event) -> Iterator[str]:
    """Serve a page with a handler that waits at the gate, and one that fails with its input."""

    def wait() -> None:
        gate.wait(60)

    def fail(text: str) -> str:
        raise ValueError(text)

    with gr.Blocks(analytics_enabled=False) as page:
        text = gr.Textbox()
        gr.Button().click(wait, None, None, api_name="wait")
        gr.Button().click(fail, text, text, api_name="fail")
    limits.limit(page)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    yield url
    gate.set()
    page.close()


def join(url: str, fn_index: int, *data: object, **headers: str) -> httpx.Response:
    body = {"data": list(data), "fn_index": fn_index, "session_hash": "s"}
    return httpx.post(f"{url}gradio_api/queue/join", json=body, headers=headers)


def test_an_address_gets_a_part_of_the_queue_and_then_its_places_back(
    url: str, gate: threading.Event
) -> None:
    answers = [join(url, 0) for _ in range(limits.CALLS_OF_ADDRESS + 1)]
    assert [answer.status_code for answer in answers[:-1]] == [200] * limits.CALLS_OF_ADDRESS
    assert answers[-1].status_code == 503
    assert "from your address" in answers[-1].text
    gate.set()
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash=s", timeout=30) as events:
        for line in events.iter_lines():
            if "close_stream" in line:
                break
    assert join(url, 0).status_code == 200


def test_behind_the_proxy_of_a_space_the_address_is_that_of_the_person(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_ID", "owner/name")
    answers = [
        join(url, 0, **{"x-forwarded-for": f"9.9.9.{forged}, 1.2.3.4, 10.0.0.1"})
        for forged in range(limits.CALLS_OF_ADDRESS + 1)
    ]
    assert answers[-1].status_code == 503
    assert join(url, 0, **{"x-forwarded-for": "5.6.7.8"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("2a00:1450:4001:81b::200e", "2a00:1450:4001:81b::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:1.2.3.4", "::ffff:1.2.3.4"),
        ("testclient", "testclient"),
    ],
)
def test_in_ipv6_a_person_is_a_network(host: str, address: str) -> None:
    scope = {"type": "http", "headers": [], "client": (host, 1)}
    assert limits.address_of(Request(scope)) == address


def test_a_call_that_fails_is_one_escaped_line_in_the_log(
    url: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    calls = [(1, (FORGED,)), (1, ()), (1, (FORGED, FORGED, FORGED)), (99, ()), (0, (FORGED,))]
    for fn_index, data in calls:
        join(url, fn_index, *data)
    httpx.post(f"{url}gradio_api/queue/join", content=b"{")
    httpx.post(f"{url}gradio_api/run/fail", json={"data": [FORGED]})
    httpx.post(f"{url}gradio_api/call/fail", json={"data": [FORGED]})
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash=s", timeout=30) as events:
        for line in events.iter_lines():
            if "close_stream" in line or "process_completed" in line:
                break
    output, errors = capfd.readouterr()
    (uvicorns,) = [record for record in caplog.records if record.name == "uvicorn.error"]
    assert uvicorns.getMessage().endswith(": KeyError: 99") and uvicorns.exc_info is None
    assert "a call failed: " in errors and r"ValueError: x\n\x1b[31merror" in errors
    assert "Traceback" not in output + errors and "\x1b" not in output + errors
    assert not any(line.startswith("error: all") for line in (output + errors).splitlines())


def test_nobody_passes_by_the_queue(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.post(f"{url}gradio_api/run/fail", json={"data": ["x"]}).status_code == 404
    monkeypatch.setattr(limits.routes.shutil, "which", lambda _: "/usr/bin/ffmpeg")
    video = {"video": ("a.mp4", b"no film", "video/mp4")}
    answer = httpx.post(f"{url}gradio_api/process_recording", files=video)
    assert answer.content == b"no film"  # as it came: FFmpeg has not seen it
