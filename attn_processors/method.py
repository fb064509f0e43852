"""A method is settings plus mathematics.

A method knows nothing about model classes. It says which layers it is for (`roles`, `wants`) and turns one opened
attention call into the tokens that go into the output projection (`attend`). Everything that differs between models
(projections, norms, where the grid comes from) is the business of a family; see `families`.

A method object is immutable and JSON-able, so the same value drives Python, the command line and the file a picture
is saved in. State that outlives a call lives in the context, never here.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from .context import Context
    from .layer import LayerCall
    from .ops.layout import TokenLayout


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a family tells a method about one attention layer before anything runs."""

    name: str  # module path inside the denoiser
    role: str  # "spatial" (image tokens among themselves), "joint" (image and text tokens), "temporal" (frames)
    level: int  # 0 = the highest resolution that has attention of this role
    heads: int
    width: int  # heads * head dimension


@dataclass(frozen=True, kw_only=True)
class AttnMethod:
    """Base of the attention processors people name: frozen settings and `attend`.

    Fields of a subclass are its settings; they must be JSON-able (bool, int, float, str, tuples and dataclasses of
    these). A subclass with its own `__post_init__` calls `super().__post_init__()` first, which checks the types.
    """

    on_mismatch: Literal["raise", "stock"] = "raise"  # tokens do not fit the grid: error, or the stock layer + warning

    name: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ("spatial",)  # of the layers it is for
    honours_mask: ClassVar[bool] = False  # True: `attend` uses any `call.mask`; else a masked call is an error
    honours_padding: ClassVar[bool] = False  # True: it uses a mask that hides whole keys, bool of shape (B, 1, 1, N)
    any_order: ClassVar[bool] = False  # True: its layers work on image tokens in any order, which `call.layout` tells

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}({field.name}=...)"
            object.__setattr__(self, field.name, coerce(getattr(self, field.name), hints[field.name], where))

    @property
    def wants_tiles(self) -> bool:
        """True if its layers are faster with the model's tokens in tile order, see `tile_order`."""
        return False

    def wants(self, layer: LayerInfo) -> bool:
        """True for the layers of its roles that this method is for. Default: all of them."""
        return True

    @property
    def neutral(self) -> bool:
        """True if these settings equal stock attention; the layers then run the stock processor, bit for bit."""
        return False

    def phase(self, progress: float) -> int:
        """The phase to run at `progress` in [0, 1) of the denoising steps.

        Asked by the context once per root call, outside compiled regions, and only if a subclass overrides it.
        """
        return 0

    @property
    def phased(self) -> bool:
        """True if `phase` can differ between steps, so that the context has to read the timestep."""
        return type(self).phase is not AttnMethod.phase

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer: (B, M, heads * head_dim), before the output projection.

        M is the number of tokens of the layer, or less if `call.unmerge` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no attend(call, phase)")

    def prepare(self, context: Context) -> None:
        """Called once per root call before any layer, outside compiled regions: draw indices, move tables."""

    def outlook(self, context: Context, layers: Sequence[LayerInfo]) -> str:
        """What the method is expected to save in these layers, in a line or a few for `Handle.report()`; may be empty."""
        return ""

    def strip_rows(self, layout: TokenLayout) -> int | None:
        """Rows that stay together when the picture is split over ranks; None: the method cannot be split."""
        return None

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """What training adds to a layer beside its own weights: name -> first value, fp32; see `LayerCall.extra`."""
        return {}

    def patches(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        """(module, attribute, replacement) triples that `install` sets and removal puts back."""
        return []

    def hooks(self, context: Context) -> list[Any]:
        """Hooks it needs in the model besides its layers; `install` asks for them, and removal calls their `remove`."""
        return []

    def settings(self) -> dict[str, Any]:
        """The fields as a plain dict; `from_settings` (also after a round trip through JSON) gives an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build from a dict whose values may be strings, as they come from a command line ("0.4" -> 0.4).

        Raises ValueError for an unknown key or a bad value, TypeError for a value of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in settings if key not in known]:
            raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
        return cls(**settings)

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 temb: Any = None) -> Tensor:  # fmt: skip
        """Diffusers called this object as a bare processor: say how to install it instead."""
        raise RuntimeError(
            f"{type(self).__name__} was set with the stock set_attn_processor, which gives it neither layers nor the "
            f"grid: use reattend.attn_processors.install(pipe, {type(self).__name__}(...)), or make the pipeline "
            "pluggable first: reattend.pipelines.pluggable(pipe).set_attn_processor(...)."
        )


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` asks for; strings are read as literals where the hint is no string.

    Raises TypeError (wrong type) or ValueError (not one of the allowed literals), naming `where`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} wants one of {', '.join(map(repr, args))}, got {value!r}.")
        return value
    if hint is Any or (hint is str and isinstance(value, str)):
        return value
    if isinstance(value, str):
        value = _literal(value)
    if hint is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if origin is tuple and isinstance(value, (list, tuple)):
        return _coerce_tuple(value, args, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _coerce_dataclass(value, hint, where)
    raise TypeError(f"{where} wants {_spell(hint)}, got {value!r} ({type(value).__name__}).")


def _coerce_union(value: Any, options: tuple, where: str) -> Any:
    bad_value = None
    for option in options:
        try:
            return coerce(value, option, where)
        except TypeError:
            continue
        except ValueError as error:  # right type, bad value: says more than the list of types
            bad_value = bad_value or error
    if bad_value is not None:
        raise bad_value
    raise TypeError(f"{where} wants {' or '.join(map(_spell, options))}, got {value!r} ({type(value).__name__}).")


def _coerce_tuple(value: typing.Sequence, args: tuple, where: str) -> tuple:
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(coerce(item, args[0], where) for item in value)
    if len(value) != len(args):
        raise TypeError(f"{where} wants {len(args)} values, got {len(value)}: {value!r}.")
    return tuple(coerce(item, hint, where) for item, hint in zip(value, args, strict=True))


def _coerce_dataclass(value: Mapping, hint: Any, where: str) -> Any:
    hints = typing.get_type_hints(hint)
    known = [field.name for field in dataclasses.fields(hint)]
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{where} has no field {unknown[0]!r}; it has {', '.join(known)}.")
    return hint(**{key: coerce(item, hints[key], f"{where}.{key}") for key, item in value.items()})


def _literal(text: str) -> Any:
    """A command line word as the Python value it spells, or itself."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
