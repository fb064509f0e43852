"""The film job: a recipe in, an MP4 out, of any length, on one process or many.

    torchrun --nproc-per-node 4 -m reattend.ui.cli video "a red balloon on sea" --frames 256

Each rank calls the stock pipeline once, on its own frames; attention and norms ask the other ranks for the rest
(`stream`). The pipeline's own loop makes the film: we choose the noise, give each frame its text, listen after every step,
and decode at the end. A film that was stopped goes on where it was, also with another number of ranks.
"""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attn_processors.comm import Comm, Span
from ..attn_processors.installer import patched
from ..attn_processors.ops.scopes import Clip
from . import checkpoint
from .agreement import check_alike, check_backends, held_for_all, named, request_digest, stop_wanted
from .borrowing import Schedule, TextOfFrames, join_controlnet
from .checks import complete_attention
from .events import Cancelled, CancelToken, StepEvent
from .files import check_writable
from .filling_in import check_length, completed
from .film import check_film_path, check_fits, require_ffmpeg
from .film_inputs import FilmInputs, with_inputs
from .film_kinds import check_makes_films
from .film_pictures import Pictures
from .image import Clock, attention_of, told_memory, without_progress_bar
from .load import load
from .noise import PerFrameStep, frame_noise
from .offloading import device_of, kept_on_host
from .perturbed import perturbed
from .prompts import FramePrompts
from .recipe import Recipe
from .stream import CLIP, streamed
from .writing import write_film

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["Film", "long_video"]

DUAL_SCOPE = "dual-scope"
SAVE_EVERY = 300.0  # seconds between two checkpoints


@dataclass(frozen=True, kw_only=True, eq=False)
class Film:
    """A finished film.

    Attributes:
        path: of the MP4; the first rank wrote it.
        recipe: makes the same frames again; nothing is left to chance or defaults.
        sent: bytes this rank sent between layers.
    """

    path: Path
    recipe: Recipe
    sent: int = 0


def long_video(
    recipe: Recipe,
    out: str | Path,
    *,
    pipe: Any = None,
    video: Pictures | None = None,
    conditioning_frames: Pictures | Sequence[Pictures] | None = None,
    ip_adapter_image: Image.Image | str | Path | None = None,
    clip: int = CLIP,
    on_step: Callable[[StepEvent], None] | None = None,
    cancel: CancelToken | None = None,
    save_every: float = SAVE_EVERY,
) -> Film:
    """Make the film that `recipe` describes. The number of ranks changes who computes, never what.

    Under torch.distributed every rank calls alike, with a seed in the recipe; all of them see the folder of `out`. The
    process group needs gloo for tensors of the host and, on CUDA, NCCL for those of the card: "cpu:gloo,cuda:nccl". Set
    TORCH_NCCL_BLOCKING_WAIT=1 before that is started: else a frozen rank ends the others from within torch, without a name.
    A film that was stopped or died is in `out` + ".parts"; the same call goes on with it.

    Args:
        recipe: what to make; `recipe.video` says how long. Without dual-scope in its attention, that is added.
        out: the MP4 file.
        pipe: a loaded AnimateDiff pipeline, used in place of `recipe.model`; it is left as it was found.
        video: the film to start from, for video-to-video; `recipe.video.strength` says how much of it may change. A picture
            for every frame: a list of PIL pictures, an MP4, or a folder of picture files in the order of their names.
        conditioning_frames: what the ControlNet follows, a picture for every frame; a list of these for several nets. For a
            sparse one a picture for each of `recipe.video.controlnet_frame_indices`.
        ip_adapter_image: picture for the IP-Adapter that the UNet carries.
        clip: frames on the device at a time; changes memory and time, not the film.
        on_step: called in this thread after every denoising step (clips = 1), then after every written clip.
        cancel: one rank's is enough; asked within steps and between written clips, in one process while pictures are read,
            too. What is done is kept, of a step that was not finished the one before.
        save_every: seconds between two checkpoints.

    Raises:
        Cancelled: if `cancel` was requested.
        ValueError: for a recipe without video, a pipeline that makes no films, too much text, pictures that are
            missing or too many, ranks that were called differently, a process group without the backends it needs, an
            unfinished film of another recipe at `out`, another process that makes this very film.
        TypeError: for something in place of pictures.
        RankLost: another rank is gone or did not answer in time; it is named.
        RuntimeError: if the model computed no pictures (not-a-number values).
        MemoryError: if a clip is too large for the memory there is.
    """
    comm = Comm.of_group()  # first of all: it counts the films, alike on ranks that go no further
    out, began, cancel = Path(out), time.monotonic(), cancel or CancelToken()
    cancel.check()
    check_film_path(out)
    check_writable(out)
    require_ffmpeg()
    if recipe.video is None:
        raise ValueError("the recipe has no video; give it one: Recipe(prompt=..., video=Video(frames=64))")
    if recipe.upscale is not None:
        raise ValueError("the recipe enlarges a picture, which films cannot; set its upscale to None")
    if recipe.linear is not None:
        raise ValueError("the recipe asks for a linear student, which films cannot use; set its linear to None")
    if comm.size > 1 and recipe.seed is None:
        raise ValueError("a film on several ranks needs a seed that all of them know; set recipe.seed")
    if comm.size > recipe.video.frames:
        raise ValueError(
            f"{recipe.video.frames} frames cannot be split over {comm.size} ranks; use at most {recipe.video.frames}"
        )
    with named(comm):
        if pipe is None:
            pipe = load(recipe.model, dtype=recipe.dtype)
        given = {"video": video, "conditioning_frames": conditioning_frames, "ip_adapter_image": ip_adapter_image}
        recipe = filled_in(recipe, pipe, given, cancel if comm.size == 1 else None)
        check_fits(recipe)
        check_backends(comm, device_of(pipe.unet))
        digest = request_digest(recipe, pipe)
        control = copy.copy(comm)  # counts its own bytes
        control.sent = 0
        check_alike(control, digest)
        spared = told_memory(f"{clip} frames of {recipe.width} x {recipe.height} pixels", "a smaller clip or size")
        with held_for_all(control, checkpoint.parts_folder(out)), spared:
            making = _Making(recipe, pipe, given, out, digest, control, cancel, began, save_every, on_step)
            latents, film = making.denoise(clip, comm)
            making.write(latents, film)
    return Film(path=out, recipe=recipe, sent=comm.sent)


def filled_in(
    recipe: Recipe, pipe: Any, given: Mapping[str, Any] | None = None, cancel: CancelToken | None = None
) -> Recipe:
    """The recipe with size, seed, guidance, attention, inputs, model and versions as they will be used.

    given: pictures by argument of `long_video`; `cancel` is asked while they are read.

    Raises:
        Cancelled: if `cancel` was requested.
        ValueError: if `pipe` makes no films, or cannot do what the recipe asks for with what is given.
        TypeError: for something in place of pictures.
    """
    accepts = inspect.signature(pipe.__call__).parameters
    check_makes_films(pipe)
    recipe = completed(recipe, pipe, accepts)
    video = recipe.video
    assert video is not None
    for name, text in (("prompt", recipe.prompt), ("negative prompt", recipe.negative)):
        check_length(name, text, pipe, accepts)
    for frame, text in video.later:
        check_length(f"the prompt from frame {frame}", text, pipe, accepts)
    if video.later and "pooled_prompt_embeds" in accepts:
        raise ValueError(f"{type(pipe).__name__} takes one pooled text for the whole film; give one prompt")
    recipe = with_inputs(recipe, pipe, given or {}, cancel)
    own = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    attention = recipe.attention
    if not any(entry["name"] == DUAL_SCOPE for entry in attention):
        attention = (*attention, *complete_attention([{"name": DUAL_SCOPE}]))
    usual = own * pipe.vae_scale_factor
    return replace(recipe, width=recipe.width or usual, height=recipe.height or usual, attention=attention)


class _Making:
    """One film on its way."""

    def __init__(
        self,
        recipe: Recipe,
        pipe: Any,
        given: Mapping[str, Any],
        out: Path,
        digest: str,
        control: Comm,
        cancel: CancelToken,
        began: float,
        save_every: float,
        on_step: Callable[[StepEvent], None] | None,
    ):
        self.recipe, self.pipe, self.given = recipe, pipe, given
        self.out, self.digest, self.control = out, digest, control
        self.cancel, self.save_every, self.on_step = cancel, save_every, on_step
        self.clock, self.saved_at, self.steps = Clock(began), time.monotonic(), 0
        self.folder = checkpoint.parts_folder(out)
        self.last: checkpoint.Moment | None = None  # after the newest step
        self.saved = 0  # step of the newest checkpoint

    def denoise(self, clip: int, comm: Comm) -> tuple[Tensor, Clip]:
        """This rank's finished latents (1, C, f, H, W), and the frames of all ranks."""
        recipe, pipe, video = self.recipe, self.pipe, self.recipe.video
        assert video is not None and recipe.seed is not None
        with (
            attention_of(recipe, pipe),
            join_controlnet(pipe),
            streamed(pipe, video.frames, clip=clip, comm=comm, cancel=self.cancel) as film,
        ):
            self.film = Clip(self.control, film.parts)
            resumed = self._resumed()
            text, arguments = self._text(film.own)
            inputs = FilmInputs(pipe, recipe, self.given, film.own)
            arguments |= inputs.arguments()
            schedule = Schedule(pipe, resumed, inputs.source(clip) if resumed is None else None)
            step = PerFrameStep(pipe.scheduler, recipe.seed, film.own)
            triples = [(pipe.scheduler, "step", step), *schedule.patches, *inputs.patches(), *kept_on_host(pipe)]
            latents = self._noise(film.own).to(pipe.dtype) if resumed is None else resumed.latents
            readers = [model for model in (pipe.unet, getattr(pipe, "controlnet", None)) if model is not None]
            hooks = [model.register_forward_pre_hook(TextOfFrames(text), with_kwargs=True) for model in readers]
            try:
                with patched(triples), perturbed(pipe), without_progress_bar(pipe):
                    self.begin = 0 if resumed is None else resumed.step
                    output = pipe(
                        **arguments,
                        width=recipe.width,
                        height=recipe.height,
                        num_inference_steps=recipe.steps,
                        guidance_scale=recipe.guidance,
                        latents=latents,
                        output_type="latent",
                        callback_on_step_end=self._after_step,
                    )
            except Cancelled:
                if self.last is not None and self.last.step > self.saved:
                    self._save(self.last)
                raise
            finally:
                for hook in hooks:
                    hook.remove()
        self.steps = self.steps or self.begin  # all steps were done before
        return output.frames, self.film

    def _resumed(self) -> checkpoint.Moment | None:
        """What an earlier run left; all ranks find the same."""
        found = checkpoint.latest(self.folder, self.digest)
        mine = torch.tensor([-1 if found is None else found.step])
        self.control.place = "comparing checkpoints"
        for rank, theirs in enumerate(self.control.everyones(mine)):
            if not torch.equal(theirs, mine):
                raise ValueError(
                    f"rank {rank} finds step {int(theirs)} in {self.folder}, rank {self.control.rank} step {int(mine)} "
                    "(-1 is none); all ranks must see one and the same folder"
                )
        if found is None:
            return None
        self.saved = found.step
        self.last = found.read(self.film.own)
        return self.last

    def _after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = self.steps = self.begin + pipe.num_timesteps
        done = self.begin + index + 1
        latents = tensors["latents"]
        self.last = checkpoint.Moment(done, latents, checkpoint.scheduler_state(pipe.scheduler, latents.shape[2]))
        if self.on_step is not None:
            event = self.clock.event(index + 1, pipe.num_timesteps, latents)
            self.on_step(replace(event, step=done, steps=steps))
        due = time.monotonic() - self.saved_at > self.save_every
        stop, save = self._agreed(self.cancel.requested, due, done)
        if save or done == steps:
            self._save(self.last)
        if stop:
            raise Cancelled("stopped on request")
        return tensors

    def _agreed(self, stop: bool, save: bool, step: int) -> tuple[bool, bool]:
        """Stop if any rank was asked to, save when the first one says so."""
        self.control.place = f"step {step}"
        votes = self.control.everyones(torch.tensor([stop, save], dtype=torch.uint8))
        return any(bool(vote[0]) for vote in votes), bool(votes[0][1])

    def _save(self, moment: checkpoint.Moment) -> None:
        checkpoint.save(self.folder, moment, self.film, self.digest, self.recipe.to_json())
        self.saved, self.saved_at = moment.step, time.monotonic()

    def _noise(self, own: Span) -> Tensor:
        pipe, recipe = self.pipe, self.recipe
        assert recipe.seed is not None and recipe.width is not None and recipe.height is not None
        size = (recipe.height // pipe.vae_scale_factor, recipe.width // pipe.vae_scale_factor)
        return frame_noise(recipe.seed, own, (pipe.unet.config.in_channels, *size))

    @torch.no_grad()
    def _text(self, own: Span) -> tuple[FramePrompts, dict[str, Any]]:
        """What each frame is told, and what stands for it in the pipeline's own arguments."""
        recipe, pipe, video = self.recipe, self.pipe, self.recipe.video
        assert video is not None
        guided = recipe.guidance is not None and recipe.guidance > 1
        wanted = inspect.signature(pipe.encode_prompt).parameters
        once = {name: 1 for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in wanted}
        encode = functools.partial(
            pipe.encode_prompt, device=device_of(pipe.text_encoder), do_classifier_free_guidance=guided, **once
        )
        prompts = [recipe.prompt, *(text for _, text in video.later)]
        made = {text: encode(text, negative_prompt=recipe.negative or None) for text in dict.fromkeys(prompts)}
        texts = torch.cat([made[text][0] for text in prompts])
        first = made[recipe.prompt]
        text = FramePrompts(texts, first[1] if guided else None, video, own)
        placeholder = torch.zeros_like(texts[:1, :1])
        arguments = {"prompt_embeds": placeholder}
        if guided:
            arguments["negative_prompt_embeds"] = placeholder
        if len(first) == 4:
            arguments["pooled_prompt_embeds"] = first[2]
            if guided:
                arguments["negative_pooled_prompt_embeds"] = first[3]
        return text, arguments

    def write(self, latents: Tensor, film: Clip) -> None:
        """Decode all frames and write them on the first rank; then the checkpoints go."""
        write_film(self.pipe, self.recipe, self.out, latents, film, self._told_clip)
        if film.comm.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        checkpoint.barrier(film.comm)

    def _told_clip(self, number: int, clips: int, left: float, frames: np.ndarray | None) -> None:
        """A clip is in the file; a stop asked for by then leaves the file with it. left: seconds."""
        if self.on_step is not None:
            event = self.clock.event(max(1, self.steps - self.begin), max(1, self.steps - self.begin), None)
            event = replace(event, step=self.steps, steps=self.steps, clip=number, clips=clips)
            self.on_step(replace(event, eta=left, frames=frames))
        if number + 1 < clips:
            self.control.place = "the file"
            if stop_wanted(self.control, self.cancel):
                raise Cancelled("stopped on request")
