"""Which pipelines make films: those of the AnimateDiff family, as long as nothing in them mixes frames behind our back."""

from __future__ import annotations

import inspect
from typing import Any

from .noise import check_scheduler
from .perturbed import check_perturbs

__all__ = ["check_makes_films"]


def check_makes_films(pipe: Any) -> None:
    """Raise ValueError, in one sentence that says what to do, if `long_video` cannot make films with this pipeline."""
    name, accepts = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    needed = {"prompt_embeds", "latents", "num_inference_steps", "callback_on_step_end"}
    if not needed <= set(accepts) or "image" in accepts or not hasattr(pipe, "motion_adapter"):
        raise ValueError(
            f"{name} makes no film; use an AnimateDiff pipeline such as AnimateDiffPipeline or AnimateDiffSDXLPipeline"
        )
    check_perturbs(pipe)
    net = getattr(pipe, "controlnet", None)
    if net is not None and any(part.config.global_pool_conditions for part in getattr(net, "nets", [net])):
        raise ValueError(
            f"{name} has a ControlNet that pools its conditions, which the stock pipeline itself cannot add up under "
            "guidance; use a ControlNet with global_pool_conditions=False"
        )
    if any(_compiled(part) for part in (pipe.unet, net) if part is not None):
        raise ValueError(
            f"{name} has a compiled UNet or ControlNet, which runs in one piece, while films call its parts a clip at a time; "
            "load the pipeline without torch.compile"
        )
    if any(parameter.is_meta for part in (pipe.unet, net) if part is not None for parameter in part.parameters()):
        raise ValueError(
            f"{name} moves its weights layer by layer (enable_sequential_cpu_offload), which films cannot follow; call "
            "pipe.enable_model_cpu_offload() instead"
        )
    if getattr(pipe, "free_init_enabled", False):
        raise ValueError(f"{name} runs FreeInit, which mixes all frames at once; call pipe.disable_free_init() first")
    if getattr(pipe, "free_noise_enabled", False):
        raise ValueError(f"{name} runs FreeNoise, another way to long films; call pipe.disable_free_noise() first")
    check_scheduler(pipe.scheduler, 4)


def _compiled(part: Any) -> bool:
    """Did torch.compile wrap this module, or its own `compile` change it?"""
    return any(
        hasattr(net, "_orig_mod") or getattr(net, "_compiled_call_impl", None) is not None
        for net in (part, *getattr(part, "nets", ()))
    )
