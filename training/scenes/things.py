"""The vocabulary of the drawn world: kinds of things, colours, sizes, places and fields, and their English words."""

SPLITS = ("train", "validation", "test")
GRID = 3  # the picture is a grid of 3x3 cells
CELL = 32  # pixels a side
PICTURE = GRID * CELL

# One unambiguous noun per emoji; chosen to be told apart at 20 pixels, and none resembles a shape.
EMOJI = {
    "dog": "🐕", "cat": "🐈", "horse": "🐎", "cow": "🐄", "pig": "🐖", "sheep": "🐑", "elephant": "🐘",
    "giraffe": "🦒", "zebra": "🦓", "rabbit": "🐇", "turtle": "🐢", "fish": "🐟", "octopus": "🐙", "crab": "🦀",
    "snail": "🐌", "bee": "🐝", "butterfly": "🦋", "duck": "🦆", "owl": "🦉", "penguin": "🐧", "flamingo": "🦩",
    "frog": "🐸", "spider": "🕷", "apple": "🍎", "banana": "🍌", "pear": "🍐", "strawberry": "🍓", "pineapple": "🍍",
    "carrot": "🥕", "mushroom": "🍄", "pizza": "🍕", "hamburger": "🍔", "cake": "🎂", "doughnut": "🍩",
    "teapot": "🫖", "car": "🚗", "bus": "🚌", "truck": "🚚", "tractor": "🚜", "train": "🚂", "bicycle": "🚲",
    "plane": "✈", "helicopter": "🚁", "rocket": "🚀", "boat": "⛵", "house": "🏠", "castle": "🏰", "tent": "⛺",
    "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "rose": "🌹", "snowman": "⛄", "guitar": "🎸", "drum": "🥁",
    "book": "📕", "clock": "⏰", "chair": "🪑", "key": "🔑", "camera": "📷", "hat": "🎩", "umbrella": "☂",
    "bell": "🔔", "robot": "🤖", "ladder": "🪜", "crown": "👑", "ball": "⚽", "dress": "👗",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
THINGS = tuple(EMOJI)
KINDS = THINGS + SHAPES

COLOURS = {
    "red": (214, 38, 38),
    "orange": (246, 132, 22),
    "yellow": (248, 208, 0),
    "green": (30, 140, 58),
    "blue": (32, 82, 204),
    "purple": (134, 50, 172),
    "black": (24, 24, 26),
    "brown": (122, 72, 34),
}
BACKGROUNDS = {
    "white": (250, 250, 248),
    "grey": (176, 178, 183),
    "green": (174, 222, 158),
    "blue": (162, 203, 240),
    "pink": (250, 188, 210),
    "yellow": (250, 236, 142),
}
SIZES = {"small": (20, 25), "large": (34, 40)}  # longest side in pixels, both ends included

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
PLACE_PHRASES = (
    ("in the top left corner", "at the top left", "in the upper left corner"),
    ("at the top", "in the middle of the top row", "at the top in the centre"),
    ("in the top right corner", "at the top right", "in the upper right corner"),
    ("on the left", "in the middle of the left side", "at the left"),
    ("in the middle", "in the centre", "in the center"),
    ("on the right", "in the middle of the right side", "at the right"),
    ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    ("at the bottom", "in the middle of the bottom row", "at the bottom in the centre"),
    ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
)
# Words that mean the same. They are used in descriptions, captions and questions, never in answers.
SYNONYMS = {
    "rabbit": "bunny", "plane": "airplane", "doughnut": "donut", "bicycle": "bike", "hamburger": "burger",
    "boat": "sailboat", "ball": "football", "car": "automobile", "truck": "lorry",
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")

_PLURALS = {"sheep": "sheep", "fish": "fish", "octopus": "octopuses", "snowman": "snowmen", "bunny": "bunnies",
            "strawberry": "strawberries", "butterfly": "butterflies", "lorry": "lorries"}  # fmt: skip


def plural(noun: str) -> str:
    """Return the plural of one of our nouns: `plural("bus")` is "buses"."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def with_article(words: str) -> str:
    """Put "a" or "an" before a phrase: `with_article("orange star")` is "an orange star"."""
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words
