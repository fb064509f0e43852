"""The settings of an attention as form fields, in plain words, made from the processor class itself.

Every dataclass field of a class in `ATTN_PROCESSORS` becomes one field, so a new setting needs no change here; `WORDS`
only gives well-known ones a plainer label, and `FIRST` names those that most people want. Knows nothing of Gradio.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

STOCK = "stock"  # the choice that installs nothing

METHOD_WORDS: dict[str, str] = {
    STOCK: "As the model was made (stock)",
    "agent": "Agent attention: faster on large pictures (agent)",
    "clear": "Local attention: very large pictures with FLUX and SD3 (clear)",
    "neighborhood": "Local attention in squares (neighborhood)",
    "linear": "Linear attention, kernel form: for students trained with it (linear)",
    "inline": "Linear attention, InLine form: for students trained with it (inline)",
    "flow": "Linear attention, flow form: for students trained with it (flow)",
    "agent-joint": "Joint attention through agents: for students trained with it (agent-joint)",
    "mixture-of-heads": "Local attention by some of the heads: for students trained with it (mixture-of-heads)",
    "routed": "Tiles look at the tiles that fit them: for students trained with it (routed)",
    "isolation-reposition": "Keep subjects apart, by boxes (isolation-reposition)",
    "dual-scope": "Near frames and anchors: videos of any length (dual-scope)",
}

# What is shown at once; the others unfold.
FIRST: dict[str, tuple[str, ...]] = {
    "agent": ("ratio", "levels"),
    "clear": ("radius", "pattern"),
    "neighborhood": ("radius",),
    "mixture-of-heads": ("radius", "active"),
    "routed": ("tile", "topk"),
    "isolation-reposition": ("panels",),
    "dual-scope": ("anchors",),
}

WORDS: dict[str, tuple[str, str]] = {
    # setting: (label, hint)
    "preset": ("Starting point", "Schedule the other settings change"),
    "phases": ("A schedule of your own", "In place of the starting point"),
    "ratio": ("How much is merged", "Share of the picture's tokens, 0 up to 1; more is faster and coarser"),
    "agent_ratio": ("How few go-betweens", "Share of tokens that are no agents, 0 up to 1; 0 is without agents"),
    "p": ("How sharply go-betweens are chosen", "Exponent of the scale; smaller is sharper"),
    "c": ("How much detail goes straight through", "Weight of a token's own value"),
    "agents": ("How many go-betweens along a side", "More is finer and slower"),
    "levels": ("How deep it reaches", "Resolutions of the model, counted from the finest"),
    "destinations": ("Which tokens stay put", "fixed: the centre of each cell; random: any"),
    "seed": ("Seed of the random tokens", "Its own; leaves the picture's seed alone"),
    "fp32_logits": ("Weights in full precision", "For models that give black pictures in half precision"),
    "radius": (
        "How far a spot looks",
        "In tokens, 16 pixels each with FLUX; more is closer to the model as made, and slower",
    ),
    "pattern": ("Shape of the surroundings", "disc: as published; square; tile: whole tiles"),
    "tile": ("Size of a tile", "Rows and columns in tokens"),
    "topk": ("How many tiles are looked at", "More is closer to the model as made, and slower"),
    "shared": ("Heads that are always on", "Share of all, 0 up to 1"),
    "active": ("Heads that are on", "Share of all, those that always are among them; less is coarser"),
    "route": ("Who chooses the heads", "token: each spot; sample: the whole picture, which is faster"),
    "balance": ("How evenly heads are used", "Weight of a loss in training"),
    "radii": ("Other radii in some layers", "Pairs of a pattern for layer names and a radius"),
    "pool": ("A coarse view of everything", "Side of the cells that are averaged; empty is none"),
    "pool_budget": ("How coarse at most", "Most averaged cells; empty is no limit"),
    "scale": ("Sharpness away from the trained size", "none, tokens, tokens_x10, visible, or a number"),
    "trained": ("Trained size", "Rows, columns and text tokens; some kinds of sharpness compare with it"),
    "start": ("Begins after", "Share of the steps; before it the model's own attention"),
    "until": ("Ends after", "Share of the steps; after it the model's own attention"),
    "backend": ("Who computes it", "Same picture; auto takes the fastest that runs here"),
    "panels": ("Who is where", "Such as (({'subject': 'cat', 'box': (0, 0, 0.5, 1)},),); without it nothing changes"),
    "references": ("References", "Rows in front of the pictures; a story makes them"),
    "caption_rows": ("Captions of subjects", "Rows after the references, in joint layers; a story makes them"),
    "source": ("Where references come from", "rows of the same call, or a bank; a story chooses"),
    "strength": ("How strongly subjects follow their references", "0 to 1"),
    "isolate": ("When subjects are kept apart", "From and to which share of the steps"),
    "refer": ("When references are seen", "From and to which share of the steps"),
    "reference_layers": ("Layers that see references", "A pattern for layer names; . is all"),
    "reposition": ("How references are laid onto subjects", "auto: by what the model has"),
    "fit": ("Proportions of a reference", "uniform keeps them"),
    "mass": ("Weight of a reference", "1: by the size of the subject; empty: as resampling would"),
    "overlap": ("Where subjects overlap", "Whose the place is"),
    "branches": ("Guidance that sees references", "both, or only the one with the prompt"),
    "text_mix": ("How much of its own text a subject reads", "0 to 1"),
    "warmup": ("Steps before subjects are looked for", "Share of the steps; only without boxes"),
    "strict": ("Refuse when a subject is not found", "Otherwise it is left alone"),
    "window": ("How many near frames are seen", "Itself included; empty is the length of the training clips"),
    "anchors": ("How many frames from all over", "More keeps things alike over the film, and is slower"),
    "train_frames": ("Length of the training clips", "In frames; 16 for AnimateDiff"),
    "token_scale": ("Sharper where more is seen", "none, log, or sqrt_log of the frames seen"),
    "on_mismatch": ("If the picture's size does not fit", "raise: say so; stock: the model's own attention there"),
}


@dataclass(frozen=True)
class Setting:
    """One field of the form.

    Attributes:
        name: the dataclass field.
        kind: "flag" (bool), "choice" (one of `choices`), "number" (a whole number that must be there) or "text"
            (anything else; the class itself reads it).
        label: what it is, in plain words.
        hint: more about it, with its name.
        default: the class's default, as the form shows it.
        optional: whether the field may be empty, which means None.
    """

    name: str
    kind: Literal["flag", "choice", "number", "text"]
    label: str
    hint: str
    default: Any
    choices: tuple[Any, ...] = ()
    optional: bool = False

    def shown(self, value: Any) -> Any:
        """A value of the setting as the form shows it."""
        return as_text(value) if self.kind == "text" else value

    def read(self, value: Any) -> Any:
        """What the form holds as a value that the class's `from_settings` reads.

        Raises:
            ValueError: an empty field that must not be empty.
        """
        if value is None or str(value).strip() == "":
            if self.optional:
                return None
            default = self.default if self.kind == "number" else repr(self.default)
            raise ValueError(
                f'The field "{self.label}" ({self.name}) is empty; give a value, such as the default {default}.'
            )
        return int(value) if self.kind == "number" and float(value).is_integer() else value


def settings_of(method: type) -> tuple[Setting, ...]:
    """The form fields of a processor class: its own settings first, what all classes share last."""
    hints = typing.get_type_hints(method)
    fields = [f for f in dataclasses.fields(method) if f.init]
    fields.sort(key=lambda f: f.name not in vars(method).get("__annotations__", {}))
    return tuple(_setting(f.name, hints[f.name], _default(f)) for f in fields)


def as_text(value: Any) -> str:
    """A value as it can be typed: (0, 1) is "(0, 1)", None is empty."""
    return "" if value is None else str(value)


def method_label(name: str) -> str:
    return METHOD_WORDS.get(name, name)


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _setting(name: str, hint: Any, default: Any) -> Setting:
    label, words = WORDS.get(name, (name.replace("_", " ").capitalize(), "Technical name"))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in options
    kinds = tuple(o for o in options if o is not type(None))
    common: dict[str, Any] = {"name": name, "label": label, "hint": f"{words} ({name})", "optional": optional}
    if kinds == (bool,):
        return Setting(kind="flag", default=bool(default), **common)
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
        return Setting(kind="choice", default=default, choices=typing.get_args(kinds[0]), **common)
    if kinds == (int,) and not optional:
        return Setting(kind="number", default=default, **common)
    return Setting(kind="text", default=as_text(default), **common)
