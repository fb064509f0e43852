"""Films are computed where hooks of offloading say, which a CPU shows with weights on the meta device in place of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn

from reattend.attn_processors.comm import Comm
from reattend.attn_processors.installer import patched
from reattend.attn_processors.ops.scopes import Clip
from reattend.pipelines import Recipe, Video
from reattend.pipelines.borrowing import Schedule
from reattend.pipelines.filming import _Making
from reattend.pipelines.offloading import device_of, kept_on_host
from reattend.pipelines.sparse_control import SparseConditions
from reattend.pipelines.stream import _OwnClipWise, _Work

CPU, AWAY = torch.device("cpu"), torch.device("meta")


class Net(nn.Module):
    """Weights, and what they are given has to be where they are."""

    def __init__(self, place: torch.device):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1, device=place)), []
        self.config = SimpleNamespace(latent_channels=4, scaling_factor=2.0)

    def forward(self, sample):
        assert sample.device == self.weight.device
        self.seen.append(len(sample))
        return (sample * self.weight,)

    def encode(self, x):
        assert x.device == self.weight.device
        self.seen.append(tuple(x.shape))
        return SimpleNamespace(latents=torch.ones(1, 4, 6, 8))


def test_a_model_computes_where_its_hook_says_or_its_weights_are():
    net = Net(AWAY)
    assert device_of(net) == AWAY
    net._hf_hook = SimpleNamespace(execution_device="cpu")
    assert device_of(net) == CPU


def test_pictures_of_a_sparse_net_are_encoded_where_the_vae_is_while_latents_stay_in_host_memory():
    vae = Net(AWAY)
    pipe = SimpleNamespace(
        vae=vae, components={"vae": vae}, device=AWAY, vae_scale_factor=4, prepare_image=None,
        control_image_processor=VaeImageProcessor(vae_scale_factor=4, do_normalize=False),
        controlnet=SimpleNamespace(use_simplified_condition_embedding=True, dtype=torch.float32),
    )  # fmt: skip
    video = Video(frames=7, controlnet_frame_indices=(5, 1))
    recipe = Recipe(prompt="a cat", width=32, height=24, seed=5, video=video)
    sparse = SparseConditions(pipe, recipe, [Image.new("RGB", (90, 50))] * 2, (3, 7))
    assert sparse.arguments()["controlnet_frame_indices"] == [2]
    with patched([*sparse.patches(), *kept_on_host(pipe)]):
        assert device_of(vae) == CPU
        made = pipe.prepare_image([], width=32, height=24, device=CPU, dtype=torch.float16)
    assert vae.seen == [(1, 3, 24, 32)] and not hasattr(vae, "_hf_hook")
    assert torch.equal(made, torch.full((1, 4, 1, 6, 8), 2.0, dtype=torch.float16))


def test_a_controlnet_that_is_moved_by_its_first_clip_gets_all_clips_where_it_goes():
    net = Net(CPU)
    accelerate.cpu_offload_with_hook(net, AWAY)
    work = _Work(SimpleNamespace(), Clip(Comm(), ((0, 7),)), 3, None)
    (made,) = _OwnClipWise(net, work)(torch.ones(7, 2, device=AWAY))
    assert net.seen == [3, 3, 1] and made.shape == (7, 2) and net.weight.device == AWAY


def test_latents_of_a_film_to_start_from_and_of_a_checkpoint_lie_where_the_pipeline_computes():
    away = SimpleNamespace(scheduler=diffusers.DDIMScheduler(), prepare_latents=None, _execution_device=AWAY)
    schedule = Schedule(away, None, torch.zeros(1, 4, 3, 2, 2))
    made = schedule.latents(latents=torch.zeros(1, 4, 3, 2, 2), timestep=torch.tensor([5]))
    assert made.device == AWAY and made.shape == (1, 4, 3, 2, 2)


def test_texts_are_encoded_where_the_text_encoder_goes():
    places = []

    def encode_prompt(prompt, device, do_classifier_free_guidance, negative_prompt):
        places.append(device)
        return torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)

    encoder = SimpleNamespace(device=CPU, _hf_hook=SimpleNamespace(execution_device=AWAY))
    recipe = Recipe(prompt="a cat", guidance=5.0, video=Video(frames=4, later=((2, "a dog"),)))
    making = SimpleNamespace(recipe=recipe, pipe=SimpleNamespace(text_encoder=encoder, encode_prompt=encode_prompt))
    _Making._text(making, (0, 4))
    assert places == [AWAY, AWAY]
