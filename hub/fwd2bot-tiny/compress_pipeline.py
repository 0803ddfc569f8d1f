"""`fwd2bot-compress`: pictures to summaries."""

from typing import Any

from .pipeline_batches import BatchedPipeline, checked_picture, each_input, is_picture, refuse_unknown


class CompressPipeline(BatchedPipeline):
    """Compress pictures once, to search them and to answer about them later from a few vectors each.

    ```python
    pipe = pipeline("fwd2bot-compress")
    summary = pipe(["a.jpg", "b.jpg"], num_summary_tokens=8)
    summary.save_file("pictures.safetensors")
    ```
    """

    def __call__(self, images: Any, *, num_summary_tokens: int | None = None, **kwargs: Any) -> Any:
        """Compress one picture, a list of pictures, or a stream of them.

        Args:
            images: a path, a URL, bytes, a `PIL.Image`, a uint8 array; a list of these; or a data set (its column
                "image"), a generator or another iterable.
            num_summary_tokens: length k of the summaries. Default: the largest that the model has.
            batch_size, num_workers, progress: see [`BatchedPipeline`].

        Returns:
            For one picture a `Fwd2BotSummary` of length 1. For a list one `Fwd2BotSummary` in its order, with tokens
            `(N, k, d)`: `summary[3]` and `for one in summary` give single ones, `summary.save_file(path)` writes all.
            For a data set or an iterator an iterator of summaries of length 1, which reads, compresses and keeps no
            more than a batch at a time; `Fwd2BotSummary.cat(list(iterator))` joins them. Always on the CPU.

        Raises:
            TypeError, ValueError, FileNotFoundError: for an empty list, a picture that cannot be read (naming its
                place in the list), or a length out of range.
        """
        parameters = {} if num_summary_tokens is None else {"num_summary_tokens": num_summary_tokens}
        if is_picture(images):
            return super().__call__(checked_picture(images), **parameters, **kwargs)
        outputs = super().__call__(each_input(images, checked_picture, "picture", ("image",)), **parameters, **kwargs)
        return type(outputs[0]).cat(outputs) if isinstance(outputs, list) else outputs

    def _sanitize_parameters(self, num_summary_tokens: int | None = None, **unknown: Any) -> tuple[dict, dict, dict]:
        refuse_unknown(unknown, self, ("num_summary_tokens", "batch_size", "num_workers", "progress"))
        return {}, {} if num_summary_tokens is None else {"num_summary_tokens": num_summary_tokens}, {}

    def input_name(self, index: int, value: Any) -> str:
        return f"Picture {index}"

    def preprocess(self, image: Any) -> Any:
        return self.processor.load_image(image)

    def _forward(self, pictures: list[Any], num_summary_tokens: int | None = None) -> list[Any]:
        return list(self.compress_pictures(pictures, num_summary_tokens).to("cpu"))

    def postprocess(self, summary: Any) -> Any:
        return summary
