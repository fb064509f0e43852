"""Films from pictures: ControlNets, video-to-video and IP-Adapters do in a film what they do in the stock pipeline."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import MultiControlNetModel
from films import close, make, make_on_ranks
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from reattend.attn_processors import installed
from reattend.pipelines import Cancelled, CancelToken, Recipe, Video, film_pictures, long_video
from reattend.pipelines.checkpoint import latest, parts_folder
from reattend.pipelines.film import film_file, frames_of
from reattend.pipelines.film_inputs import ConditionOfFrames, FilmInputs, with_inputs
from reattend.pipelines.film_pictures import count_of, digest_of, pictures_of
from reattend.pipelines.noise import frame_noise, generator
from reattend.pipelines.stream import streamed

DUAL = {"name": "dual-scope", "window": 4, "anchors": 2}
SIZE = {"width": 32, "height": 24}
KINDS = {"ControlNet": 1, "two nets": 2, "VideoToVideo": 1, "VideoToVideoControlNet": 1}


def pipeline(kind: str):
    return tiny.animatediff_inputs("ControlNet" if kind == "two nets" else kind, KINDS[kind])


def recipe(frames: int = 7, **more) -> Recipe:
    length = {"strength": 0.7} if "strength" in more else {}
    more.pop("strength", None)
    later = {"later": ((3, "a blue car"),), "blend": 2} if more.pop("later", False) else {}
    settings = {"steps": 3, "seed": 5, "attention": (DUAL,), "negative": "a dog", **SIZE}
    return Recipe(prompt="a red cat", video=Video(frames=frames, **length, **later), **(settings | more))


def pictures(frames: int, seed: int = 0, size: tuple[int, int] = (20, 30)) -> list[Image.Image]:
    drawn = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in drawn]


def inputs(kind: str, frames: int) -> dict:
    """What a pipeline of this kind is given."""
    given = {}
    if kind == "two nets":
        given["conditioning_frames"] = [pictures(frames, 1), pictures(frames, 2)]
    elif "Control" in kind:
        given["conditioning_frames"] = pictures(frames, 1)
    if "Video" in kind:
        given["video"] = pictures(frames, 3)
    return given


def stock(pipe, kind: str, frames: int, monkeypatch) -> torch.Tensor:
    """What the stock pipeline makes of the same noise."""
    noise = frame_noise(5, (0, frames), (4, 12, 16))
    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 3, "output_type": "latent"}
    settings |= SIZE | inputs(kind, frames)
    if "Video" not in kind:
        return pipe(**settings, num_frames=frames, latents=noise).frames

    def drawn_by_the_vae(shape, **_):
        return torch.stack([torch.randn(shape[1:], generator=generator(5, "source", i)) for i in range(shape[0])])

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.models.autoencoders.vae.randn_tensor", drawn_by_the_vae)
        patch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", lambda shape, **_: noise.transpose(1, 2))
        return pipe(**settings, strength=0.7).frames


@functools.cache
def alone(kind: str, folder) -> dict[int, torch.Tensor]:
    """The latents of the film of one process after each step."""
    return make(tiny.fresh(pipeline(kind)), wanted(kind), folder / f"{kind}.mp4", **inputs(kind, 7)).latents


def wanted(kind: str, **more) -> Recipe:
    return recipe(later=True, **({"strength": 0.7} if "Video" in kind else {}), **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.mark.parametrize("frames", [3, 7], ids=["within the window", "beyond it"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_stock_pipeline_with_the_same_noise(kind, frames, tmp_path, monkeypatch):
    pipe = tiny.fresh(pipeline(kind))
    if frames <= 4:
        want = stock(pipe, kind, frames, monkeypatch)
    else:
        with installed(pipe, "dual-scope", window=4, anchors=2):
            want = stock(pipe, kind, frames, monkeypatch)
    given = {} if "Video" not in kind else {"strength": 0.7}
    watch = make(pipe, recipe(frames, **given), tmp_path / "cat.mp4", **inputs(kind, frames))
    close(watch.latents[max(watch.latents)], want)
    assert max(watch.latents) == (2 if "Video" in kind else 3)
    changed = {"prepare_latents", "prepare_video", "prepare_conditioning_frames", "get_timesteps"}
    assert not pipe.unet._forward_pre_hooks and not changed & set(vars(pipe))
    net = getattr(pipe, "controlnet", None)
    assert (net is None) == (kind == "VideoToVideo")
    assert net is None or not (net._forward_pre_hooks or "forward" in vars(net))


@pytest.mark.parametrize("kind", ["ControlNet", "VideoToVideoControlNet"])
def test_pictures_count(kind, folder, tmp_path):
    pipe = tiny.fresh(pipeline(kind))
    want = alone(kind, folder)
    for word in inputs(kind, 7):
        other = inputs(kind, 7) | {word: pictures(7, 9)}
        got = make(pipe, wanted(kind), tmp_path / f"{word}.mp4", **other).latents
        last = max(want)
        assert (got[last] - want[last]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "two nets"])
def test_two_ranks_begin_the_film_of_one_and_one_process_ends_it(kind, folder, tmp_path, monkeypatch):
    want, out = alone(kind, folder), tmp_path / "cat.mp4"
    begun = make_on_ranks(
        monkeypatch, 2, wanted(kind), out, build=lambda: pipeline(kind), stop_after=1, **inputs(kind, 7)
    )
    close(begun[1], want[1])
    assert max(begun) == 1 and latest(parts_folder(out)).step == 1
    ended = make(tiny.fresh(pipeline(kind)), wanted(kind), out, **inputs(kind, 7))
    last = max(want)
    close(ended.latents[last], want[last])
    if "Video" in kind:  # or the same numbers would be decoded to other pixels
        assert ended.latents[last].stride() == want[last].stride()
    assert min(ended.latents) == 2 and ended.events[0].steps == last


def test_video_to_video_draws_chance_and_keeps_history_alike_on_ranks_and_after_a_stop(tmp_path, monkeypatch):
    def change(pipe):
        from diffusers import DPMSolverMultistepScheduler

        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
        )

    pipe = tiny.fresh(pipeline("VideoToVideo"))
    change(pipe)
    film, given = recipe(5, steps=5, strength=0.7), inputs("VideoToVideo", 5)
    want = make(pipe, film, tmp_path / "whole.mp4", **given).latents
    out = tmp_path / "cat.mp4"
    more = {"build": lambda: pipeline("VideoToVideo"), "stop_after": 2, **given}
    make_on_ranks(monkeypatch, 2, film, out, change, **more)
    close(make(pipe, film, out, **given).latents[3], want[3])
    assert max(want) == 3


def test_the_recipe_tells_what_went_into_the_film_and_refuses_other_pictures(folder, tmp_path):
    kind = "VideoToVideoControlNet"
    alone(kind, folder)
    made, given = Recipe.read(folder / f"{kind}.mp4"), inputs(kind, 7)
    assert made.video.pictures == {word: digest_of(word, row)[1] for word, row in given.items()}
    assert made.video.strength == 0.7 and made.video.controlnet_conditioning_scale == 1.0
    assert made.video.pag_scale is None and made.video.ip_adapter_scale is None
    pipe, out = tiny.fresh(pipeline(kind)), tmp_path / "cat.mp4"
    with pytest.raises(ValueError, match="the recipe was made with other video: got pictures with the digest"):
        long_video(replace(made, model="x"), out, pipe=pipe, **(given | {"video": pictures(7, 9)}))
    stopped = make(pipe, wanted(kind), out, stop_after=1, **given)
    with pytest.raises(ValueError, match="unfinished film of another recipe or model"):
        make(pipe, wanted(kind), out, **(given | {"conditioning_frames": pictures(7, 9)}))
    assert max(stopped.latents) == 1


def test_ranks_that_were_given_other_pictures_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"rank . was given another recipe or other weights than rank"):
        make_on_ranks(
            monkeypatch, 2, wanted("ControlNet"), tmp_path / "cat.mp4", build=lambda: pipeline("ControlNet"),
            each=lambda rank: {"conditioning_frames": pictures(7, rank)},
        )  # fmt: skip


def test_pictures_come_from_a_list_a_folder_or_a_film(tmp_path):
    rows = pictures(5, size=(16, 24))
    for i, picture in enumerate(rows):
        picture.save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert digest_of("video", tmp_path) == digest_of("video", rows) == digest_of("video", str(tmp_path))
    assert [x.tobytes() for x in pictures_of("video", tmp_path, (1, 3))] == [x.tobytes() for x in rows[1:3]]
    film = tmp_path / "film.mp4"
    with film_file(film, 24, 16, Recipe(prompt="a cat", video=Video(frames=5))) as file:
        for picture in rows:
            file.write(np.asarray(picture))
    shown = [Image.fromarray(frame) for frame in frames_of(film)]
    assert digest_of("video", film) == digest_of("video", shown) and len(shown) == 5
    assert [x.tobytes() for x in pictures_of("video", film, (2, 4))] == [x.tobytes() for x in shown[2:4]]
    assert count_of("video", rows) == count_of("video", tmp_path) == count_of("video", film) == 5


def test_no_more_pictures_are_read_than_tell_that_there_are_too_many_and_a_stop_ends_it(tmp_path, monkeypatch):
    for i, picture in enumerate(pictures(9)):
        picture.save(tmp_path / f"{i}.png")
    read, token, plain = [], CancelToken(), film_pictures.opened
    monkeypatch.setattr(film_pictures, "opened", lambda *words: read.append(words) or plain(*words))
    pipe, given = tiny.fresh(pipeline("ControlNet")), {"conditioning_frames": tmp_path}
    with pytest.raises(ValueError, match=re.escape("has 9 pictures, but the film has 4 frames; give one for every")):
        with_inputs(recipe(4), pipe, given)
    assert len(read) == 5

    def stop(*words):
        token.request()
        return plain(*words)

    monkeypatch.setattr(film_pictures, "opened", stop)
    with pytest.raises(Cancelled):
        long_video(recipe(9), tmp_path / "out" / "cat.mp4", pipe=pipe, cancel=token, **given)
    assert not (tmp_path / "out").exists()


def test_a_clip_of_conditioning_frames_becomes_numbers_when_it_is_needed(tmp_path, monkeypatch):
    most, plain = [], ConditionOfFrames.take

    def take(self, first, end):
        most.append(end - first)
        return plain(self, first, end)

    monkeypatch.setattr(ConditionOfFrames, "take", take)
    pipe = tiny.fresh(pipeline("ControlNet"))
    seen, stock_forward = [], pipe.controlnet.conv_in.forward
    pipe.controlnet.conv_in.forward = lambda x: seen.append(len(x)) or stock_forward(x)
    make(pipe, recipe(7, steps=1), tmp_path / "cat.mp4", conditioning_frames=pictures(7))  # in clips of 3
    assert most == seen == [3, 3, 3, 3, 2]


BAD = {
    "needs conditioning_frames: give a picture for every frame": {},
    "conditioning_frames has 6 pictures, but the film has 7 frames; .* set Video": {"conditioning_frames": pictures(6)},
    "conditioning_frames has 8 pictures, but the film has 7": {"conditioning_frames": pictures(8)},
    "takes no video; leave it out, or use AnimateDiffVideoToVideoPipeline": {
        "conditioning_frames": pictures(7), "video": pictures(7),
    },
    "takes no ip_adapter_image": {"conditioning_frames": pictures(7), "ip_adapter_image": pictures(1)[0]},
    "nowhere is not there; give an MP4 or a folder of pictures": {"conditioning_frames": "nowhere"},
    "does not play": {"conditioning_frames": __file__},
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_too_much_and_too_little_is_told_in_one_sentence(words, tmp_path):
    out = tmp_path / "cat.mp4"
    with pytest.raises(ValueError, match=words):
        long_video(recipe(), out, pipe=tiny.fresh(pipeline("ControlNet")), **BAD[words])
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_told_in_one_sentence(animatediff, tmp_path):
    out = tmp_path / "cat.mp4"
    net, video = (tiny.fresh(pipeline(kind)) for kind in ("ControlNet", "VideoToVideo"))
    with pytest.raises(TypeError, match="must be a list of PIL pictures, an MP4 or a folder of pictures, got ndarray"):
        long_video(recipe(), out, pipe=net, conditioning_frames=[np.zeros((8, 8, 3))] * 7)
    with pytest.raises(ValueError, match="AnimateDiffControlNetPipeline takes no strength, got 0.7"):
        long_video(recipe(strength=0.7), out, pipe=net, conditioning_frames=pictures(7))
    with pytest.raises(ValueError, match="AnimateDiffPipeline takes no video; leave it out"):
        long_video(recipe(), out, pipe=animatediff, video=pictures(7))
    with pytest.raises(ValueError, match="strength 0.7 of 1 steps leaves no step"):
        long_video(recipe(strength=0.7, steps=1), out, pipe=video, video=pictures(7))
    film = replace(recipe(), video=Video(frames=7, pictures={"conditioning_frames": 64 * "0"}))
    with pytest.raises(ValueError, match="takes no conditioning_frames, with which the recipe was made"):
        long_video(film, out, pipe=animatediff)
    with pytest.raises(
        ValueError, match="has 2 ControlNets here; give conditioning_frames as a list with the pictures"
    ):
        long_video(recipe(), out, pipe=tiny.fresh(pipeline("two nets")), conditioning_frames=pictures(7))
    with pytest.raises(ValueError, match="has one ControlNet here, got 2 times conditioning_frames; give them once"):
        long_video(recipe(), out, pipe=net, conditioning_frames=["poses", "edges"])
    with pytest.raises(ValueError, match="conditioning_frames has 0 pictures, .* give one for every frame$"):
        long_video(recipe(), out, pipe=net, conditioning_frames=[])
    with pytest.raises(ValueError, match="the folder .* holds no pictures; put PNG, JPEG or WebP files into it"):
        long_video(recipe(), out, pipe=net, conditioning_frames=tmp_path)
    net.controlnet.register_to_config(global_pool_conditions=True)
    with pytest.raises(ValueError, match="has a ControlNet that pools its conditions"):
        long_video(recipe(), out, pipe=net, conditioning_frames=pictures(7))
    assert not list(tmp_path.iterdir())


def add_ip_adapter(pipe) -> None:
    """A tiny one with random weights, as `load_ip_adapter` installs it."""
    torch.manual_seed(0)
    width = tiny.TEXT_WIDTH
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, projection_dim=width,
        image_size=32, patch_size=16,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    layers = {}
    for name in pipe.unet.attn_processors:
        if "attn2" in name and "motion_modules" not in name:
            attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
            place = len(layers) // 2 * 2 + 1
            for which in ("k", "v"):
                layers[f"{place}.to_{which}_ip.weight"] = 0.2 * torch.randn(attention.inner_dim, width)
    projection = {
        "proj.weight": torch.randn(4 * width, width) / width**0.5, "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.set_ip_adapter_scale(0.8)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_the_picture_of_an_ip_adapter_counts_as_in_the_stock_pipeline(animatediff, frames, tmp_path):
    plain = stock(animatediff, "text", frames, None)
    add_ip_adapter(animatediff)
    (picture,) = pictures(1)
    noise = frame_noise(5, (0, frames), (4, 12, 16))
    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 3, "output_type": "latent"}
    with installed(animatediff, "dual-scope", window=4, anchors=2):
        want = animatediff(
            **settings, **SIZE, num_frames=frames, latents=noise, ip_adapter_image=picture
        ).frames  # fmt: skip
    watch = make(animatediff, recipe(frames), tmp_path / "cat.mp4", ip_adapter_image=picture)
    close(watch.latents[3], want)
    assert frames == 7 or (want - plain).abs().max() > 1e-2
    assert Recipe.read(tmp_path / "cat.mp4").video.ip_adapter_scale == 0.8


def test_the_scale_of_an_ip_adapter_is_the_recipes(animatediff, tmp_path):
    add_ip_adapter(animatediff)
    (picture,) = pictures(1)
    animatediff.set_ip_adapter_scale(0.3)
    want = make(animatediff, recipe(3), tmp_path / "a.mp4", ip_adapter_image=picture).latents[3]
    animatediff.set_ip_adapter_scale(0.8)
    film = recipe(3)
    film = replace(film, video=replace(film.video, ip_adapter_scale=0.3))
    close(make(animatediff, film, tmp_path / "b.mp4", ip_adapter_image=picture).latents[3], want)
    adapters = [part for part in animatediff.unet.attn_processors.values() if hasattr(part, "scale")]
    assert adapters and all(part.scale == [0.8] for part in adapters)
    with pytest.raises(ValueError, match="needs ip_adapter_image: give a picture for its IP-Adapter; or call"):
        long_video(recipe(3), tmp_path / "c.mp4", pipe=animatediff)


def test_a_controlnet_is_put_back_also_after_an_error(tmp_path):
    pipe = tiny.fresh(pipeline("ControlNet"))
    with installed(pipe, "dual-scope"), pytest.raises(ZeroDivisionError), streamed(pipe, 7):
        assert 1 / ("forward" not in vars(pipe.controlnet))
    assert "forward" not in vars(pipe.controlnet)


def test_several_nets_may_be_one(tmp_path):
    pipe, given = tiny.fresh(pipeline("ControlNet")), pictures(3, 1)
    want = make(pipe, recipe(3, steps=1), tmp_path / "one.mp4", conditioning_frames=given).latents[1]
    pipe.register_modules(controlnet=MultiControlNetModel([pipe.controlnet]))
    for i, rows in enumerate((given, [given])):
        got = make(pipe, recipe(3, steps=1), tmp_path / f"{i}.mp4", conditioning_frames=rows).latents[1]
        close(got, want)


def test_the_picture_of_an_ip_adapter_is_encoded_where_the_encoder_goes(animatediff, monkeypatch):
    add_ip_adapter(animatediff)
    animatediff.image_encoder._hf_hook = SimpleNamespace(execution_device=torch.device("meta"))
    places = []
    monkeypatch.setattr(animatediff, "prepare_ip_adapter_image_embeds", lambda *words: places.append(words[2]) or [])
    FilmInputs(animatediff, recipe(3), {"ip_adapter_image": pictures(1)[0]}, (0, 3)).arguments()
    assert places == [torch.device("meta")]


def test_an_ip_adapter_without_an_image_encoder_is_told(animatediff, tmp_path):
    add_ip_adapter(animatediff)
    animatediff.register_modules(image_encoder=None)
    with pytest.raises(
        ValueError, match=r"an IP-Adapter but no image encoder for its picture; call pipe.load_ip_adapter"
    ):
        long_video(recipe(3), tmp_path / "cat.mp4", pipe=animatediff, ip_adapter_image=pictures(1)[0])
