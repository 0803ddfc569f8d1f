"""A scene whose texts are worked out by hand."""

from fwd2bot.training.scenes import Scene, Thing


def thing(kind: str, cell: int, size: str = "small", colour: str | None = None) -> Thing:
    pixels = {"small": 22, "large": 36}[size]
    return Thing(kind, colour, size, cell, 32 * (cell % 3) + 16, 32 * (cell // 3) + 16, pixels, False)


# small dog    large dog   -
# red circle   cat         blue circle      (the red one is large, the blue one small)
# -            -           large bus        on a green field
BY_HAND = Scene(
    "test",
    0,
    "green",
    (
        thing("dog", 0),
        thing("dog", 1, "large"),
        thing("circle", 3, "large", "red"),
        thing("cat", 4),
        thing("circle", 5, "small", "blue"),
        thing("bus", 8, "large"),
    ),
)
