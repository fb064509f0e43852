"""What `make demo` shows on the bundled models: stock, agent and local attention from the same prompts and seeds, story and film.

    python examples/demo.py

Writes to out/demo/: every picture with its recipe, one contact sheet (sheet.png), a table of times and of what the
reader saw in the pictures (table.md, table.json), the story of story.json (story/strip.png), and a film three times as long as
the clips its model knows (film.mp4, with some of its frames in film.png). Needs no network and about a minute on two CPU
cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from reattend.emoji_world.read import read, score
from reattend.pipelines import Picture, Recipe, Script, Video, film_sheet, generate, load, long_video, story
from reattend.pipelines.files import written_whole
from reattend.ui.finding import find_emoji

PROMPTS = (
    "a blue car on sand",
    "a red apple and a green tree on snow",
    "a yellow duck on sea",
    "a purple butterfly and a pink flower on grass",
    "an orange cat and a cyan fish and a yellow star on night",
    "a red balloon and a house on dusk",
)
ARMS: dict[str, tuple[dict[str, Any], ...]] = {
    "stock": (),
    "agent": ({"name": "agent"},),
    "clear": ({"name": "clear", "radius": 6},),
}
STORY = Path(__file__).with_name("story.json")
FILM = Recipe(prompt="a red balloon and an orange cat on sea", model="tiny-video", seed=7, video=Video(frames=48))
SIDE, MARGIN, TEXT = 160, 8, 14  # of the contact sheet, in pixels


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: shares of right answers over all pictures of an arm, and its time."""

    attention: str
    pictures: int
    seconds: float  # median of one picture
    kinds: float
    tints: float
    background: float


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("out/demo"))
    options.add_argument("--steps", type=int, default=20)
    given = options.parse_args(argv)

    pipe = load("tiny-sd")
    generate(
        Recipe(prompt=PROMPTS[0], steps=1, seed=0), pipe=pipe
    )  # the first call pays for loading, not for attention
    pictures: dict[str, list[Picture]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number, prompt in enumerate(tqdm(PROMPTS, unit="prompt", disable=None)):
        for arm, attention in ARMS.items():
            began = time.perf_counter()
            picture = generate(Recipe(prompt=prompt, steps=given.steps, seed=number, attention=attention), pipe=pipe)
            seconds[arm].append(time.perf_counter() - began)
            pictures[arm].append(picture)
            picture.recipe.save(picture.image, given.out / f"{number + 1}-{arm}.png")

    rows = [to_row(arm, pictures[arm], seconds[arm]) for arm in ARMS]
    table = to_table(rows)
    files = tuple(given.out / name for name in ("sheet.png", "table.md", "table.json"))
    with written_whole(*files) as (sheet_file, table_file, json_file):
        contact_sheet(pictures).save(sheet_file, format="PNG")
        table_file.write_text(table + "\n", encoding="utf-8")
        made_with = pictures["stock"][0].recipe.made_with
        json_file.write_text(
            json.dumps({"made_with": made_with, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
    tale = replace(Script.read(STORY), steps=given.steps)
    story(tale, pipe=pipe, find=find_emoji).save(given.out / "story")
    film = long_video(replace(FILM, steps=min(given.steps, 10)), given.out / "film.mp4").path
    film_sheet(film, FILM.video.frames).save(film.with_suffix(".png"))
    print(f"{table}\n\nPictures: {files[0]}\nStory: {given.out / 'story' / 'strip.png'}\nFilm: {film}")


def to_row(arm: str, pictures: list[Picture], seconds: list[float]) -> Row:
    scores = [score(read(picture.image), picture.recipe.prompt) for picture in pictures]
    return Row(
        attention=arm,
        pictures=len(pictures),
        seconds=statistics.median(seconds),
        kinds=statistics.mean(s.kinds for s in scores),
        tints=sum(s.tints_right for s in scores) / sum(s.named for s in scores),
        background=statistics.mean(s.background for s in scores),
    )


def to_table(rows: list[Row]) -> str:
    lines = ["| attention | s per picture | kinds right | tints right | background right |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.attention} | {row.seconds:.2f} | {row.kinds:.0%} | {row.tints:.0%} | {row.background:.0%} |"
        )
    return "\n".join(lines)


def contact_sheet(pictures: dict[str, list[Picture]]) -> Image.Image:
    """One row per attention, one column per prompt; labels from Pillow's own font."""
    columns = len(PROMPTS)
    cell = (SIDE + MARGIN, SIDE + MARGIN + TEXT)
    head = 2 * TEXT + MARGIN
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, head + len(pictures) * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(PROMPTS):
        draw.multiline_text(
            (MARGIN + column * cell[0], MARGIN), textwrap.fill(prompt, 30), fill="black", font_size=10, spacing=2
        )
    for row, (arm, arm_pictures) in enumerate(pictures.items()):
        for column, picture in enumerate(arm_pictures):
            corner = (MARGIN + column * cell[0], head + row * cell[1])
            draw.text(corner, arm, fill="black", font_size=11)
            sheet.paste(picture.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (corner[0], corner[1] + TEXT))
    return sheet


if __name__ == "__main__":
    main()
