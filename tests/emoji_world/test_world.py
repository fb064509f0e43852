import numpy as np
import pytest
from PIL import Image

from reattend.emoji_world.world import (
    BACKGROUNDS,
    KINDS,
    LATTICE,
    TINTS,
    Clause,
    Scene,
    Sprite,
    draw,
    is_held_out,
    parse_caption,
    sample_captions,
    sample_scene,
    tinted_sprite,
)

SCENES = 60
ASPECTS = (0.5, 0.8, 1.0, 1.37, 2.0)


def scenes(aspect: float = 1.0, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, aspect=aspect) for _ in range(SCENES)]


def test_captions_parse_back_to_their_scene() -> None:
    for scene in scenes():
        clauses, background = parse_caption(scene.caption)
        ordered = sorted(scene.sprites, key=lambda sprite: sprite.x)
        assert background == scene.background
        assert clauses == tuple(Clause(s.kind, s.tint if s.named else None) for s in ordered)


def test_articles_follow_the_first_letter() -> None:
    sprites = (Sprite("apple", "red", 0.2, 0.5, 0.4, named=False), Sprite("car", "orange", 0.7, 0.5, 0.4))
    assert Scene("sea", sprites).caption == "an apple and an orange car on sea"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a car",
        "a car on mars",
        "on sand",
        "a red on sand",
        "a car and on sand",
        "two cars on sand",
        "a pale car on sand",
    ],
)
def test_text_of_another_world_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(caption)


def test_held_out_captions_are_a_tenth_and_never_in_the_rest() -> None:
    held, rest = (sample_captions(np.random.default_rng(0), 150, held_out=h) for h in (True, False))
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, rest))
    assert len(set(held)) == len(set(rest)) == 150
    share = np.mean([is_held_out(scene.caption) for seed in range(20) for scene in scenes(seed=seed)])
    assert 0.06 < share < 0.14


def test_more_captions_begin_with_the_same_ones() -> None:
    few, many = (sample_captions(np.random.default_rng(3), count) for count in (5, 25))
    assert many[:5] == few


@pytest.mark.parametrize("aspect", ASPECTS)
def test_sprites_stay_inside_and_apart_at_any_aspect(aspect: float) -> None:
    width, height = 100 * max(aspect, 1), 100 * max(1 / aspect, 1)
    tolerance = 100 / LATTICE / 2  # the lattice has whole steps, the picture need not
    for scene in scenes(aspect):
        squares = [(s.x * width, s.y * height, s.side * 100) for s in scene.sprites]
        for i, (x, y, side) in enumerate(squares):
            assert side / 2 - tolerance <= x <= width - side / 2 + tolerance
            assert side / 2 - tolerance <= y <= height - side / 2 + tolerance
            for a, b, other in squares[:i]:
                assert max(abs(x - a), abs(y - b)) >= (side + other) / 2 - tolerance


def test_looks_of_a_scene_differ() -> None:
    for scene in scenes():
        assert len({(s.kind, s.tint) for s in scene.sprites}) == len(scene.sprites)


@pytest.mark.parametrize("size", [(128, 128), (96, 131), (257, 128)], ids=str)
def test_drawing_has_the_asked_size_and_depends_on_the_scene_alone(size: tuple[int, int]) -> None:
    scene = scenes()[0]
    first = draw(scene, *size)
    np.random.seed(5)  # must not matter
    second = draw(scene, *size)
    assert first.size == size
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()


def test_the_same_seed_gives_the_same_scene() -> None:
    assert scenes(seed=7) == scenes(seed=7)
    assert scenes(seed=7) != scenes(seed=8)


def test_light_moves_the_background_and_leaves_sprites() -> None:
    sprite = Sprite("car", "blue", 0.5, 0.5, 0.5)
    dark, bright = (np.asarray(draw(Scene("dusk", (sprite,), light)), int) for light in (-1.0, 1.0))
    assert (bright[0] - dark[0] == 20).all()
    assert (bright[64, 64] == dark[64, 64]).all()


def test_every_kind_and_tint_looks_different() -> None:
    seen = {np.asarray(tinted_sprite(kind, tint)).tobytes() for kind in KINDS for tint in TINTS}
    assert len(seen) == len(KINDS) * len(TINTS)


def test_a_tinted_sprite_shows_mostly_its_tint() -> None:
    for tint, colour in TINTS.items():
        pixels = np.asarray(tinted_sprite("star", tint), int)
        solid = pixels[pixels[..., 3] == 255][:, :3]
        nearest = [min(TINTS, key=lambda name: abs(pixel - np.array(TINTS[name])).sum()) for pixel in solid[::200]]
        assert nearest.count(tint) > 0.6 * len(nearest), (tint, colour)


def test_backgrounds_run_from_top_to_bottom() -> None:
    for name, (top, bottom) in BACKGROUNDS.items():
        picture = np.asarray(draw(Scene(name, ()), 20, 200), int)
        assert abs(picture[0] - np.array(top)).max() <= 1
        assert abs(picture[-1] - np.array(bottom)).max() <= 1
    assert isinstance(draw(Scene("sand", ())), Image.Image)
