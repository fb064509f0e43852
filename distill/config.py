"""One value that describes a distillation: the same object drives Python, the command line, the run's folder and resuming.

A recipe file is TOML with the fields as keys (`examples/distill/`); a run keeps its own as `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..pipelines.checks import check_number, complete_attention, method_of
from ..pipelines.files import written_whole

if TYPE_CHECKING:
    from ..attn_processors import AttnMethod

__all__ = ["DistillConfig"]

FREE = ("steps", "micro_batch", "workers", "save_every", "keep", "log_every", "validate_every", "validation_prompts",
        "validation_steps", "trackers", "parallel", "data", "out", "model")  # may differ later, see conflict  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Training of a linear student from a pretrained teacher, which is the same model.

    The defaults of losses and their weights are those published with CLEAR (Liu et al., arXiv 2412.16112): 10,000 steps
    at batch 32 on 10,000 samples.

    Attributes:
        model: the teacher: bundled name, local diffusers folder, or hub id.
        data: folder made by `make_dataset`; or a file of prompts or a folder of pictures, from which it is made first.
        out: folder of the run: log, checkpoints, pictures, and the trained `student`, which `load_linear` installs.
        attention: what the student attends with: a name and settings, {"name": "clear", "radius": 8}.
        layers: regular expression searched in the names of attention layers; None = all that the attention is for.
        projections: which projections of these layers are trained: of the picture's stream, or of the text's as well.
        rank: None trains full copies of the projections; a number trains low-rank adapters on them, in less memory.
        steps: optimiser steps.
        batch: samples per optimiser step, over all processes; the number of processes changes who computes, never what.
        micro_batch: samples in one forward; the rest of the batch is accumulated. Smaller = less memory, slower.
        optimizer: "adamw"; "adamw-8bit" keeps its moments in a quarter of the memory, by bitsandbytes; "prodigy" finds the
            learning rate itself, by prodigyopt, and wants lr=1.
        lr: peak learning rate.
        warmup: steps over which the learning rate rises.
        schedule: how it goes on after that, to zero at the last step, or flat. Only a flat one can be given more steps later.
        weight_decay: of the optimiser.
        clip: largest norm of the gradients; larger ones are scaled down to it; 0 = they stay as they are.
        flow_weight: weight of the loss against the data (flow, noise or v, as the model predicts).
        output_weight: weight of the loss against the teacher's output.
        attention_weight: weight of the loss against the teacher's attention outputs, before the output projection.
        match: layers of that last loss: "every:4" = each fourth, "single:4" = of the single blocks only (published),
            "all", or a regular expression for names.
        times: how noise levels are drawn, before the sampler's shift; "logit-normal" favours the middle.
        logit_mean: of that normal; more = noisier, where a picture is laid out, less = cleaner, where details are made.
        guidance: guidance that models with it as an input are told; no meaning for others.
        dropout: how often a caption is left out; None = 0.1 for models that compare with an empty caption, else 0.
        radius_steps: over so many steps radii shrink from covering the picture to their own; "clear" and "neighborhood" only.
        precision: numbers to compute in; trained weights are always kept in fp32.
        checkpointing: recompute activations in backward: much less memory, about a third more time.
        ema: decay of the averaged weights, which become the student; 0 = none.
        seed: the only source of chance.
        workers: processes that read samples ahead; 0 = none.
        parallel: several processes hold whole models ("ddp"), or share the weights of one ("fsdp", for models that do not
            fit a device).
        save_every: steps between checkpoints.
        keep: newest checkpoints that stay.
        log_every: steps between lines of the log.
        validate_every: steps between pictures of the student beside the teacher; 0 = none.
        validation_prompts: what they show; one or several texts.
        validation_steps: their denoising steps, and those of samples that are made from a file of prompts.
        bad_steps: steps in a row whose gradients are no numbers, before the run gives up; such steps change nothing.
        trackers: "tensorboard", "wandb", "trackio": where to report besides the log, by accelerate; names, or a text with
            commas. A run that goes on begins a new one there, except with TensorBoard, which reads the folder.

    Raises:
        ValueError: for a value out of range or an unknown name.
        TypeError: for a value of the wrong type.
    """

    model: str
    data: Path
    out: Path = Path("runs/distill")
    attention: dict[str, Any] = field(default_factory=lambda: {"name": "clear"})
    layers: str | None = None
    projections: Literal["image", "all"] = "image"
    rank: int | None = None
    steps: int = 10_000
    batch: int = 32
    micro_batch: int = 4
    optimizer: Literal["adamw", "adamw-8bit", "prodigy"] = "adamw"
    lr: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 1e-2
    clip: float = 1.0
    flow_weight: float = 1.0
    output_weight: float = 0.5
    attention_weight: float = 0.5
    match: str = "every:4"
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    logit_mean: float = 0.0
    guidance: float = 3.5
    dropout: float | None = None
    radius_steps: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    ema: float = 0.999
    seed: int = 0
    workers: int = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 10
    bad_steps: int = 10
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from ..attn_processors.method import coerce

        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in ("data", "out"):
                value = Path(value)
            elif item.name == "trackers" and isinstance(value, str) and value[:1] not in ("[", "("):  # of --set
                value = tuple(name.strip() for name in value.split(",") if name.strip())
            elif item.name == "validation_prompts" and isinstance(value, str) and value[:1] not in ("[", "("):
                value = (value,) if value.strip() else ()
            if item.name not in ("data", "out", "attention"):
                value = coerce(value, hints[item.name], f"DistillConfig({item.name}=...)")
            object.__setattr__(self, item.name, value)
        object.__setattr__(self, "attention", complete_attention([self.attention])[0])
        if self.method.phased:
            raise ValueError(
                f"{self.attention['name']!r} is another attention in some sampling steps (start, until, phases), and a "
                "training step is none of them; train without, where it can do without, and give these settings to load_linear"
            )
        for name, low, high in (("steps", 1, 10**9), ("batch", 1, 10**6), ("micro_batch", 1, 10**6), ("warmup", 0, 10**9),
                                ("radius_steps", 0, 10**9), ("seed", 0, 2**62), ("workers", 0, 256), ("save_every", 1, 10**9),
                                ("keep", 1, 10**6), ("log_every", 1, 10**9), ("validate_every", 0, 10**9),
                                ("validation_steps", 1, 1000), ("bad_steps", 1, 10**6)):  # fmt: skip
            check_number(name, getattr(self, name), int, low, high)
        for name, least, most in (("lr", 0.0, 1e3), ("weight_decay", 0.0, 1e3), ("clip", 0.0, 1e9), ("guidance", 0.0, 100.0),
                                ("flow_weight", 0.0, 1e6), ("output_weight", 0.0, 1e6), ("attention_weight", 0.0, 1e6),
                                ("logit_mean", -10.0, 10.0), ("ema", 0.0, 0.999999)):  # fmt: skip
            check_number(name, getattr(self, name), float, least, most)
        if self.optimizer == "prodigy" and self.lr < 0.1:
            raise ValueError(
                f"optimizer='prodigy' finds the learning rate itself and lr is a factor on it, got lr={self.lr}; set lr=1"
            )
        if self.logit_mean and self.times == "uniform":
            raise ValueError(
                f"logit_mean={self.logit_mean} moves the middle of times='logit-normal', got times='uniform'; leave one out"
            )
        if self.rank is not None:
            check_number("rank", self.rank, int, 1, 65_536)
        if self.dropout is not None:
            check_number("dropout", self.dropout, float, 0.0, 1.0)
        if not self.flow_weight + self.output_weight + self.attention_weight:
            raise ValueError("all three losses have weight 0, so there is nothing to learn; give one a weight")
        if self.radius_steps and self.attention["name"] not in ("clear", "neighborhood"):
            raise ValueError(
                f"radius_steps shrinks the radius of 'clear' or 'neighborhood', got {self.attention['name']!r}; set it to 0"
            )
        if self.validate_every and not self.validation_prompts:
            raise ValueError("validate_every makes pictures, but validation_prompts is empty; give some prompts")
        for name in self.trackers:
            if name not in ("tensorboard", "wandb", "trackio"):
                raise ValueError(f"no tracker {name!r}; choose from tensorboard, wandb, trackio")

    @property
    def method(self) -> AttnMethod:
        """What the student attends with."""
        return method_of(self.attention)

    def to_json(self) -> str:
        """The fields as indented JSON, paths as text."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        with written_whole(path) as (aside,):
            aside.write_text(self.to_json() + "\n")

    @classmethod
    def read(cls, path: Path, **changes: Any) -> DistillConfig:
        """From a TOML recipe or a run's JSON, with single fields replaced.

        Raises:
            ValueError: for a file that cannot be read, or a key that is no field.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read {path}: {why}; give a recipe file (TOML or JSON)") from None
        try:
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no recipe: {error}; see examples/distill for one") from None
        return cls.from_values(values, f"{path}", **changes)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str = "the recipe", **changes: Any) -> DistillConfig:
        """From a mapping as TOML or JSON give it. Raises ValueError naming a key that is no field, or one that lacks."""
        known = [item.name for item in dataclasses.fields(cls)]
        whole = {**values, **changes}
        if unknown := [key for key in whole if key not in known]:
            raise ValueError(f"{where} has an entry {unknown[0]!r}, which is none of {', '.join(known)}")
        if missing := [name for name in ("model", "data") if name not in whole]:
            raise ValueError(f"{where} tells no {missing[0]!r}; give one")
        return cls(**whole)

    def conflict(self, other: DistillConfig) -> str | None:
        """A field in which `other` would be another training than this one, or None."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        differing = [name for name in mine if mine[name] != theirs[name]]
        falls = self.schedule != "constant"  # the rate, to the last of the steps
        return next((name for name in differing if name not in FREE or (name == "steps" and falls)), None)
