import numpy as np
import pytest
from PIL import Image, ImageFilter

from reattend.emoji_world.check_reader import check
from reattend.emoji_world.read import Found, Reading, Score, read, score
from reattend.emoji_world.world import BACKGROUNDS, KINDS, Scene, Sprite, draw, tinted_sprite

SCENES = 100  # `python -m reattend.emoji_world.check_reader --scenes 1000` is the full check


def softened(picture: Image.Image) -> Image.Image:
    """About what a VAE at 28 dB leaves: half the detail gone, colours a little off, some noise."""
    rng = np.random.default_rng(picture.width)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 128)), np.float32)
    pixels = pixels + rng.normal(0, 3, 3) + rng.normal(0, 5, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def found(kind: str | None, tint: str | None = None) -> Found:
    return Found(kind, tint, (0.1, 0.1, 0.5, 0.5), 0.9 if kind else 0.0)


def test_reads_drawn_scenes_of_any_size_and_aspect() -> None:
    accuracy = check(SCENES, seed=11)
    assert accuracy.background == SCENES, accuracy
    assert accuracy.all_right >= 0.98 * SCENES, accuracy  # 99 % of 1,000: two misses in 100 are no surprise


def test_reads_softened_scenes() -> None:
    accuracy = check(SCENES // 2, seed=12, sides=(128, 256), change=softened)
    assert accuracy.all_right >= 0.96 * (SCENES // 2), accuracy


def test_reads_turned_sprites() -> None:
    accuracy = check(SCENES // 4, seed=13, turn=20, sides=(128, 256))
    assert accuracy.all_right >= 0.9 * (SCENES // 4), accuracy


@pytest.mark.parametrize(
    ("tint", "background"),
    [("green", "grass"), ("cyan", "sea"), ("purple", "dusk"), ("yellow", "sand"), ("blue", "night")],
)
def test_reads_sprites_whose_tint_is_near_the_background(tint: str, background: str) -> None:
    for kind in KINDS:
        reading = read(draw(Scene(background, (Sprite(kind, tint, 0.4, 0.6, 0.4),))))
        assert [(one.kind, one.tint) for one in reading.sprites] == [(kind, tint)], (kind, reading)
        assert reading.background == background


def test_reads_three_touching_sprites_and_their_boxes() -> None:
    looks = [("cat", "red"), ("cat", "orange"), ("house", "red")]
    sprites = tuple(Sprite(*look, x, 0.5, 0.3) for look, x in zip(looks, (0.2, 0.5, 0.8), strict=True))
    reading = read(draw(Scene("snow", sprites), 160, 160))
    assert [(one.kind, one.tint) for one in reading.sprites] == looks
    for one, sprite in zip(reading.sprites, sprites, strict=True):
        box = (sprite.x - 0.15, 0.35, sprite.x + 0.15, 0.65)
        np.testing.assert_allclose(one.box, box, atol=0.02)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_scene_has_no_sprites(background: str) -> None:
    assert read(draw(Scene(background, (), light=0.7), 96, 150)) == Reading(background, ())


def test_arrays_and_images_read_alike() -> None:
    picture = draw(Scene("sea", (Sprite("duck", "yellow", 0.5, 0.5, 0.5),)))
    assert read(np.asarray(picture)) == read(picture)


def _over(background: str, thing: Image.Image) -> Image.Image:
    picture = draw(Scene(background, ()))
    thing = thing.resize((56, 56), Image.Resampling.BOX)
    picture.paste(thing, (40, 30), thing)
    return picture


def _blob(colour: tuple[int, int, int], soft: bool) -> Image.Image:
    y, x = np.mgrid[:128, :128] - 63.5
    radius = np.hypot(x * 1.1, y)
    alpha = 255 * np.exp(-(radius**2) / 1800) if soft else np.clip((50 - radius) * 255, 0, 255)
    rgb = np.broadcast_to(np.array(colour), (128, 128, 3))
    return Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("background", ["snow", "night", "grass"])
def test_a_blob_is_something_but_no_kind(background: str, soft: bool) -> None:
    reading = read(_over(background, _blob((222, 38, 38), soft)))
    assert reading.background == background
    assert reading.sprites
    assert {one.kind for one in reading.sprites} == {None}
    assert all(one.tint is None and one.confidence == 0 for one in reading.sprites)


def test_two_kinds_melted_into_one_are_mostly_no_kind() -> None:
    named = []
    for one, other in zip(KINDS, KINDS[5:] + KINDS[:5], strict=True):
        a, b = (np.asarray(tinted_sprite(kind, "blue").convert("RGBa"), np.float32) for kind in (one, other))
        mixed = Image.frombytes("RGBa", (128, 128), ((a + b) / 2).astype(np.uint8).tobytes()).convert("RGBA")
        named += [(one, other, seen.kind) for seen in read(_over("sand", mixed)).sprites if seen.kind]
    assert len(named) <= len(KINDS) // 3, named  # in some pairs one kind shows clearly through the other


def test_a_picture_of_noise_has_neither_background_nor_kinds() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    reading = read(noise)
    assert reading.background is None
    assert not any(one.kind for one in reading.sprites)


def test_a_full_match_scores_everything() -> None:
    reading = Reading("sand", (found("cat", "red"), found("car", "blue")))
    assert score(reading, "a blue car and a cat on sand") == Score(
        kinds=True, background=True, sprites=2, sprites_right=2, extra=0, named=1, tints_right=1
    )


def test_a_missed_sprite_has_its_tint_wrong_too() -> None:
    found_score = score(Reading("sea", (found("cat", "red"),)), "a blue car and a red cat on sand")
    assert found_score == Score(
        kinds=False, background=False, sprites=2, sprites_right=1, extra=0, named=2, tints_right=1
    )


@pytest.mark.parametrize(
    "more", [found("dog", "red"), found("car", "blue"), found(None)], ids=["kind", "same", "unknown"]
)
def test_anything_extra_spoils_the_picture_but_not_its_sprites(more: Found) -> None:
    result = score(Reading("sand", (found("car", "blue"), more)), "a blue car on sand")
    assert (result.kinds, result.sprites_right, result.extra, result.tints_right) == (False, 1, 1, 1)


def test_sprites_of_one_kind_are_matched_in_the_best_way() -> None:
    reading = Reading("sand", (found("car", "red"), found("car", "green"), found("car", "blue")))
    result = score(reading, "a car and a blue car and a red car on sand")
    assert result.kinds
    assert (result.named, result.tints_right) == (2, 2)
    fewer = score(Reading("sand", reading.sprites[:1]), "a car and a blue car and a red car on sand")
    assert (fewer.sprites_right, fewer.tints_right) == (1, 1)


def test_a_right_tint_on_a_wrong_kind_counts_for_nothing() -> None:
    result = score(Reading("sand", (found("boat", "blue"),)), "a blue car on sand")
    assert (result.sprites_right, result.tints_right, result.extra) == (0, 0, 1)
