"""The component that takes pictures, and the errors that people see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr

from yolo.demo.pictures import Picture, read_picture
from yolo.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

class Upload(gr.Image):
    """Upload, paste or webcam; hands a `Picture` to the handlers instead of what Gradio decodes."""

    is_template = True  # drawn by the browser code of gr.Image

    def preprocess(self, payload: Any) -> Picture | None:  # type: ignore[override]
        """Decode what was sent, or tell the person what is wrong with it."""
        if payload is None or not payload.path:
            return None
        with shown_errors():
            return read_picture(payload.path)
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

@contextmanager
def shown_errors() -> Iterator[None]:
    """Turn our errors into messages on the page, without a traceback in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), title="Sorry", duration=10, print_exception=False) from None
