"""Films from pipelines that people changed: with LoRA weights, offloaded, with an IP-Adapter; and on a disk that is full."""

from __future__ import annotations

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from reattend.attn_processors import installed
from reattend.pipelines import Recipe, Video, checkpoint, long_video
from reattend.pipelines.checkpoint import latest, parts_folder
from reattend.pipelines.film import frame_count
from reattend.pipelines.noise import frame_noise

EXACT = 1e-5  # fp32, relative to the largest value: the same sums in another order
DUAL = {"name": "dual-scope", "window": 4, "anchors": 2}
SIZE = {"height": 24, "width": 32}


def recipe(frames: int, **more) -> Recipe:
    settings = {"steps": 2, "seed": 5, "attention": (DUAL,), **SIZE}
    return Recipe(prompt="a red cat", video=Video(frames=frames), **settings | more)


def latents_of(pipe, wanted, out) -> torch.Tensor:
    seen = []
    long_video(wanted, out, pipe=pipe, clip=3, on_step=lambda event: seen.append(event.latents))
    assert frame_count(out) == wanted.video.frames
    return [latents for latents in seen if latents is not None][-1]


def stock(pipe, frames: int) -> torch.Tensor:
    noise = frame_noise(5, (0, frames), (4, 12, 16))
    more = {"num_inference_steps": 2, "num_frames": frames, "latents": noise, "output_type": "latent", **SIZE}
    return pipe("a red cat", **more).frames


def close(got, want) -> None:
    torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)


def add_lora(unet) -> None:
    """On spatial and temporal layers."""
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    torch.manual_seed(0)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.03)  # more makes these random layers blow rounding up


@pytest.mark.parametrize("frames", [3, 7], ids=["within the window", "beyond it"])
def test_lora_acts_in_a_film_as_in_the_stock_pipeline(animatediff, frames, tmp_path):
    plain = stock(animatediff, frames)
    add_lora(animatediff.unet)
    if frames <= 4:
        want = stock(animatediff, frames)
    else:
        with installed(animatediff, "dual-scope", window=4, anchors=2):
            want = stock(animatediff, frames)
    close(latents_of(animatediff, recipe(frames), tmp_path / "cat.mp4"), want)
    assert (want - plain).abs().max() > 1e-2


def test_a_film_with_lora_is_not_gone_on_with_without_it(animatediff, tmp_path):
    add_lora(animatediff.unet)
    with pytest.raises(KeyboardInterrupt):
        long_video(recipe(3, steps=3), tmp_path / "cat.mp4", pipe=animatediff, save_every=0, on_step=stop_at_two)
    assert latest(parts_folder(tmp_path / "cat.mp4")).step == 1
    animatediff.unet.delete_adapters("default")
    with pytest.raises(ValueError, match="unfinished film of another recipe or model"):
        long_video(recipe(3, steps=3), tmp_path / "cat.mp4", pipe=animatediff)


def stop_at_two(event) -> None:
    if event.step == 2:
        raise KeyboardInterrupt


def test_models_that_are_offloaded_as_a_whole_make_the_same_film(animatediff, tmp_path):
    want = stock(animatediff, 3)
    hooks = []
    for part in (animatediff.text_encoder, animatediff.unet, animatediff.vae):  # as enable_model_cpu_offload does
        _, hook = accelerate.cpu_offload_with_hook(part, "cpu", hooks[-1] if hooks else None)
        hooks.append(hook)
    try:
        close(latents_of(animatediff, recipe(3), tmp_path / "cat.mp4"), want)
    finally:
        for hook in hooks:  # the text encoder and the VAE are shared
            hook.remove()


def test_what_a_film_cannot_use_is_told_in_one_sentence(animatediff, tmp_path):
    out = tmp_path / "cat.mp4"
    accelerate.cpu_offload(animatediff.unet, torch.device("cpu"))  # as enable_sequential_cpu_offload does
    with pytest.raises(ValueError, match=r"moves its weights layer by layer .* call pipe.enable_model_cpu_offload\(\)"):
        long_video(recipe(3), out, pipe=animatediff)
    accelerate.hooks.remove_hook_from_submodules(animatediff.unet)
    animatediff.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"carries an IP-Adapter that a film cannot use: .* call pipe.unload_ip_adapter\(\)"
    ):
        long_video(recipe(3), out, pipe=animatediff)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_a_checkpoint_is_told_and_the_one_before_stays(animatediff, tmp_path, monkeypatch):
    plain, saved = checkpoint.save_file, []

    def save(tensors, path):
        if len(saved) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        saved.append(path)
        plain(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save)
    out = tmp_path / "cat.mp4"
    with pytest.raises(OSError, match=r"cannot keep step 2 of the film in .*No space left on device.*; make room"):
        long_video(recipe(3, steps=3), out, pipe=animatediff, save_every=0)
    monkeypatch.undo()
    assert latest(parts_folder(out)).step == 1 and not list(tmp_path.glob("*.parts/*/.*"))
    assert len(latents_of(animatediff, recipe(3, steps=3), out)) == 1
