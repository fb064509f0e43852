"""Draw which tokens one token sees, as the operators themselves say: python examples/patterns.py [FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.patterns import Disc, Pattern, Square, TileWindow
from reattend.attn_processors.ops.pool import Pool

GRID, QUERY = (32, 32), (13, 18)  # rows and columns
TOKEN, GAP, TITLE = 9, 26, 44  # pixels
PAPER, UNSEEN, SEEN, POOLED, OWN = "#ffffff", "#e4e7eb", "#3a6fd8", "#a9c1f0", "#e4572e"
PANELS: list[tuple[str, Pattern, Pool | None]] = [
    ("radius=8", Disc(8), None),
    ("radius=8, pool=4", Disc(8), Pool(4)),
    ('pattern="square", radius=8', Square(15), None),
    ('pattern="tile", tile=(4, 4), radius=5', TileWindow((4, 4), 5), None),
]


def panel(title: str, pattern: Pattern, pool: Pool | None) -> Image.Image:
    """The grid, with the tokens that QUERY sees."""
    layout = TokenLayout(*GRID)
    places = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]))
    seen = pattern.sees(torch.tensor(QUERY), places, layout.shape).view(GRID)
    picture = Image.new("RGB", (GRID[1] * TOKEN, TITLE + GRID[0] * TOKEN), PAPER)
    pen = ImageDraw.Draw(picture)
    keys = int(seen.sum()) + (pool.keys(layout) if pool else 0)
    pen.text((0, 0), title, "#1c2430", font=ImageFont.load_default(15))
    count = f"{keys} of {seen.numel()} tokens" + (" and means" if pool else "")
    pen.text((0, 20), count, "#5b6675", font=ImageFont.load_default(13))
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            colour = OWN if (row, column) == QUERY else SEEN if seen[row, column] else UNSEEN
            left, top = column * TOKEN, TITLE + row * TOKEN
            pen.rectangle((left, top, left + TOKEN - 2, top + TOKEN - 2), colour)
    if pool:
        cell = pool.factor * pool.merged(layout) * TOKEN
        for left in range(0, GRID[1] * TOKEN, cell):
            for top in range(TITLE, TITLE + GRID[0] * TOKEN, cell):
                pen.rectangle((left, top, left + cell - 2, top + cell - 2), outline=POOLED)
    return picture


def main(file: Path) -> None:
    """All panels side by side."""
    panels = [panel(*one) for one in PANELS]
    width = sum(one.width for one in panels) + GAP * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + 2 * GAP), PAPER)
    left = GAP
    for one in panels:
        sheet.paste(one, (left, GAP))
        left += one.width + GAP
    sheet.save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/patterns.png"))
