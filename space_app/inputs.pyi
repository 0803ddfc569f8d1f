"""Gradio's inputs, where what they say or do with a bad value is not what this page should."""

from typing import Any

import gradio as gr

from gradio.events import Dependency

class Within(gr.Slider):
    """A slider whose number field takes what is typed for the nearest allowed number; Gradio's own fails."""

    is_template = True

    def preprocess(self, payload: Any) -> int:
        return self.nearest(payload)

    def nearest(self, typed: Any) -> int:
        """The allowed whole number that is nearest to what was typed, and the first value for what is no number."""
        if isinstance(typed, bool) or not isinstance(typed, (int, float)) or typed != typed:
            typed = self.value
        return int(min(max(typed, self.minimum), self.maximum))
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Files(gr.File):
    """Files that are sent; Gradio's own would be fetched from an address, without any limit."""

    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        _check_sent(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class PictureButton(gr.UploadButton):
    """The same for a button."""

    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        _check_sent(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def _check_sent(path: Any) -> None:
    if "://" in str(path):
        raise gr.Error(
            f"A picture is taken as a file, not from an address such as {str(path)[:80]!r}. Download it, and send the "
            'file: handle_file("photo.jpg").',
            print_exception=False,
        )