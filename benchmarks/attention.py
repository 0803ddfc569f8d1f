"""Where the summary tokens of the drawn pictures looked: does each token specialise?

    python benchmarks/attention.py [CHECKPOINT] [--pictures 100] [--num-summary-tokens 8] [--figure FILE.png]

Over held-out drawn scenes, of the maps of `fwd2bot.training.attention_maps` (each of sum 1 over the patches):

- entropy: of a token's map, over that of a map that is even; 1 looks everywhere alike.
- overlap: the sum of the smaller of two maps, 1 for equal ones: of two tokens of one picture, of one token in two
  pictures, and of two tokens in two pictures.
- variance: the maps as the even map and four parts: what all have in common, what a token does in every picture
  (its place), what all tokens do in a picture (its things), and the rest, what this token does in this picture.
- on things: the share of a map that lies on the patches which things cover, over the share of these patches.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from fwd2bot.pipelines.embedded import default_checkpoint
from fwd2bot.training.attention_maps import AttentionMaps, attention_maps
from fwd2bot.training.scenes import Scene, render, scene

SHOWN = (3, 7, 11)  # pictures of the figure


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of maps `(..., P)`, the mean over all of them."""
    return torch.minimum(first, second).sum(-1).mean().item()


def overlaps(maps: torch.Tensor) -> dict[str, float]:
    """Of `(N, k, P)` maps; each picture with the next one, each token with every other."""
    other = maps.roll(1, 0)
    k = maps.shape[1]
    turns = range(1, k)
    return {
        "two tokens, one picture": sum(overlap(maps, maps.roll(t, 1)) for t in turns) / len(turns),
        "one token, two pictures": overlap(maps, other),
        "two tokens, two pictures": sum(overlap(maps, other.roll(t, 1)) for t in turns) / len(turns),
    }


def variance(maps: torch.Tensor) -> dict[str, float]:
    """Shares of the squares of `(N, k, P)` maps about the even map; the parts are orthogonal, and sum to 1."""
    away = maps - 1 / maps.shape[-1]
    common = away.mean((0, 1), keepdim=True)  # (1, 1, P)
    token = away.mean(0, keepdim=True) - common  # (1, k, P)
    picture = away.mean(1, keepdim=True) - common  # (N, 1, P)
    parts = {
        "common": common,
        "token": token,
        "picture": picture,
        "token in a picture": away - common - token - picture,
    }
    total = away.pow(2).sum()
    return {name: (part.expand_as(away).pow(2).sum() / total).item() for name, part in parts.items()}


def covered(one: Scene, side: int, size: int) -> torch.Tensor:
    """`(side * side,)` bool: the patches whose middles lie in the square around a thing."""
    middles = (torch.arange(side) + 0.5) * size / side
    found = torch.zeros(side, side, dtype=torch.bool)
    for thing in one.things:
        across, down = (middles - thing.x).abs() <= thing.pixels / 2, (middles - thing.y).abs() <= thing.pixels / 2
        found |= down[:, None] & across[None, :]
    return found.flatten()


def measure(found: list[AttentionMaps], scenes: list[Scene], size: int) -> dict[str, Any]:
    maps = torch.stack([one.maps for one in found])  # (N, k, side, side)
    side = maps.shape[-1]
    maps = maps.flatten(2)  # (N, k, P)
    things = torch.stack([covered(one, side, size) for one in scenes])  # (N, P)
    lift = (maps * things[:, None]).sum(-1) / things.float().mean(-1, keepdim=True)  # (N, k)
    entropy = torch.special.entr(maps).sum(-1) / torch.tensor(float(maps.shape[-1])).log()  # (N, k)
    return {
        "entropy": [round(value, 3) for value in entropy.mean(0).tolist()],
        "picture_share": [round(v, 3) for v in torch.stack([one.picture_share for one in found]).mean(0).tolist()],
        "on_things": [round(value, 2) for value in lift.mean(0).tolist()],
        "overlap": {name: round(value, 3) for name, value in overlaps(maps).items()},
        "variance": {name: round(value, 3) for name, value in variance(maps).items()},
    }


def draw(found: list[AttentionMaps], scenes: list[Scene], file: Path) -> None:
    """A row for each picture: the picture, then the map of each token over it; below, the mean map of all pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    k, side = found[0].maps.shape[:2]
    drawing, grid = pyplot.subplots(len(SHOWN) + 1, k + 1, figsize=(1.15 * (k + 1), 1.2 * (len(SHOWN) + 1)))
    mean = torch.stack([one.maps for one in found]).mean(0)
    rows = [(render(scenes[index]), found[index].maps) for index in SHOWN] + [(None, mean)]
    for line, (picture, maps) in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        if picture is None:
            line[0].text(0.5, 0.5, f"mean of {len(found)}\npictures", ha="center", va="center", fontsize=8)
        else:
            line[0].imshow(picture)
        for axes, one in zip(line[1:], maps, strict=True):
            if picture is not None:
                axes.imshow(picture.convert("L"), cmap="gray", alpha=0.5, extent=(0, side, side, 0))
            axes.imshow(one, cmap="inferno", alpha=0.75 if picture else 1.0, extent=(0, side, side, 0))
    for number, axes in enumerate(grid[0, 1:], 1):
        axes.set_title(f"token {number}", fontsize=8)
    drawing.tight_layout(pad=0.3)
    drawing.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=default_checkpoint())
    parser.add_argument("--pictures", type=int, default=100, help="of the validation split")
    parser.add_argument("--num-summary-tokens", type=int, default=8, metavar="K")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    scenes = [scene("validation", index) for index in range(max(args.pictures, max(SHOWN) + 1))]
    pictures = [render(one) for one in scenes]
    found = [attention_maps(model, processor, one, num_summary_tokens=args.num_summary_tokens) for one in pictures]
    figures = measure(found, scenes, pictures[0].width)
    print(json.dumps({"pictures": len(scenes), **figures}, indent=2))
    if args.figure:
        draw(found, scenes, args.figure)


if __name__ == "__main__":
    main()
