"""Draw the sprite sheet `sprites.png` from Noto Color Emoji (needed only to make the sheet anew).

Run: python -m reattend.emoji_world.make_sprites [path/to/NotoColorEmoji.ttf]

The font (Debian package fonts-noto-color-emoji) is under the SIL Open Font License 1.1; the sheet carries
the notice, and OFL.txt lies beside it.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

CELL = 128  # side of one sprite on the sheet, in pixels
COLUMNS = 4
GLYPHS = {
    "car": "🚗", "cat": "🐱", "dog": "🐕", "fish": "🐟",
    "duck": "🦆", "butterfly": "🦋", "balloon": "🎈", "boat": "⛵",
    "house": "🏠", "tree": "🎄", "star": "⭐", "flower": "🌻",
    "apple": "🍎", "mushroom": "🍄", "crown": "👑", "rocket": "🚀",
}  # fmt: skip
NOTICE = "Sprites rendered from Noto Color Emoji, (c) Google Inc., licensed under the SIL Open Font License 1.1"


def draw_glyph(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """One emoji, cropped to what is visible and centred on a square CELL."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), glyph, font=font, embedded_color=True)
    visible = canvas.crop(canvas.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
    side = max(visible.size)
    square = Image.new("RGBA", (side, side))
    square.paste(visible, ((side - visible.width) // 2, (side - visible.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font = ImageFont.truetype(path, size=109)  # the only size this bitmap font holds
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(GLYPHS) // COLUMNS) * CELL))
    for i, glyph in enumerate(GLYPHS.values()):
        sheet.paste(draw_glyph(font, glyph), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    text = PngImagePlugin.PngInfo()
    text.add_text("Copyright", NOTICE)
    text.add_text("Kinds", " ".join(GLYPHS))
    sheet.save(Path(__file__).with_name("sprites.png"), pnginfo=text, optimize=True)


if __name__ == "__main__":
    main()
