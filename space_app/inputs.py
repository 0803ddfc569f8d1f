"""Gradio's inputs, where what they do with a bad value is not what this page should.

Their methods are replaced one by one: beside the module of a class that inherits from its own, Gradio writes a file.
"""

from typing import Any

import gradio as gr


def within(slider: gr.Slider) -> gr.Slider:
    """The slider, whose number field now takes what is typed for the nearest allowed number; Gradio's own fails."""
    slider.preprocess = lambda typed: nearest(slider, typed)
    return slider


def nearest(slider: gr.Slider, typed: Any) -> int:
    """The allowed whole number that is nearest to what was typed, and the first value for what is no number."""
    if isinstance(typed, bool) or not isinstance(typed, (int, float)) or typed != typed:
        typed = slider.value
    return int(min(max(typed, slider.minimum), slider.maximum))


async def refuse_address(url: str, cache_dir: str = "") -> str:
    """In place of Gradio's download, which any input would start, also one that is no file."""
    raise gr.Error(
        f"A picture is taken as a file, not from an address such as {url[:80]!r}. Download it, and send the file: "
        'handle_file("photo.jpg").',
        print_exception=False,
    )


def sent(files: Any) -> Any:
    """The input for files, which now takes only those that are sent; Gradio would fetch one from any address."""
    move = files.async_move_resource_to_block_cache

    async def move_sent(path: Any) -> str | None:
        if "://" in str(path):
            await refuse_address(str(path))
        return await move(path)

    files.async_move_resource_to_block_cache = move_sent
    return files
