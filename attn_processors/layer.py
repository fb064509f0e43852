"""One layer: the processor diffusers sees, and the attention call it opens for the method.

A `LayerProcessor` joins one method and one layer. Its `__call__` is written out by the family (diffusers reads the
signature of the class, and newer models pass by position), and normally does three things: open a `LayerCall`, let the
method attend, and close the call the way the stock processor does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from .compat import dispatch_attention_fn, is_native
from .method import AttnMethod
from .ops.layout import TokenLayout

if TYPE_CHECKING:
    from .context import Context


EXTRA = "reattend_"  # begins the names of parameters that trained methods add to a layer
TOLD = "told"  # slot of the context for what layers tell a trainer, see `LayerCall.tell`


class LayoutError(ValueError):
    """The tokens of a layer do not fit what the method needs to know about them (grid, mask)."""


class LayerCall:
    """One attention call. Shapes: B rows, N tokens, h heads of d channels, C channels of the layer's input.

    The projections run on first use, so a method that attends between merged tokens never pays for the full ones.
    """

    x: Tensor  # (B, N, C), normalised as the stock processor normalises it
    grid: tuple[int, int]  # (H, W) of the picture; H * W == N unless the layer sees other tokens too
    layout: TokenLayout  # what the tokens of q, k and v are, in order
    whole: (
        TokenLayout  # the same for all ranks together, where `context.strip` splits the picture; else equal to `layout`
    )
    mask: Tensor | None  # bool or additive, broadcastable to (B, h, N, N); None almost always
    rotary: Any = None  # tables of the rotary embedding, where the model has one
    unmerge: Callable[[Tensor], Tensor] | None  # (B, M, C) -> (B, N, C), applied after the output projection

    def __init__(
        self,
        layer: LayerProcessor,
        attn: Any,
        x: Tensor,
        grid: tuple[int, int],
        mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ):
        self._layer, self._attn = layer, attn
        self.x, self.grid, self.mask = x, grid, mask
        self.layout = self.whole = layout or TokenLayout(*grid, order=layer.context.order)
        self.unmerge = None
        self._q: Tensor | None = None
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def name(self) -> str:
        return self._layer.name

    @property
    def level(self) -> int:
        return self._layer.level

    @property
    def kept(self) -> dict[Any, Any]:
        """What the method's `prepare` left for this layer."""
        return self._layer.kept

    @property
    def context(self) -> Context:
        return self._layer.context

    @property
    def text_places(self) -> range:
        """Where text tokens are in the sequence; empty where text has layers of its own."""
        return range(0)

    @property
    def heads(self) -> int:
        return self._attn.heads

    @property
    def scale(self) -> float:
        """What the stock layer multiplies its logits with."""
        return self._attn.scale

    @property
    def q(self) -> Tensor:
        """(B, N, h, d)"""
        if self._q is None:
            self._q = self.to_q(self.x)
        return self._q

    @property
    def k(self) -> Tensor:
        """(B, N, h, d)"""
        if self._k is None:
            self._k = self.to_k(self.x)
        return self._k

    @property
    def v(self) -> Tensor:
        """(B, N, h, d)"""
        if self._v is None:
            self._v = self.to_v(self.x)
        return self._v

    @property
    def unrotated_q(self) -> Tensor:
        """`q` before the rotary embedding, where there is one: (B, N, h, d)"""
        return self.q

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, M, h, d) with the rotary embedding of these places in the sequence, (M,)."""
        return x

    def to_q(self, x: Tensor) -> Tensor:
        """Project and normalise any tokens of this layer: (B, M, C) -> (B, M, h, d)."""
        return self._layer.project_q(self._attn, x)

    def to_k(self, x: Tensor) -> Tensor:
        return self._layer.project_k(self._attn, x)

    def to_v(self, x: Tensor) -> Tensor:
        return self._layer.project_v(self._attn, x)

    @property
    def picture(self) -> Tensor:
        """The picture's own tokens among the inputs, (B, H * W, C): what `to_k` and `to_v` project."""
        return self.x

    def keys_at(self, x: Tensor, places: Tensor) -> Tensor:
        """Keys of image tokens (B, n, C) as if they lay at (row, column) of `places` (n, 2): (B, n, h, d).

        Without a rotary embedding a key does not know its place.
        """
        return self.to_k(x)

    def extra(self, name: str) -> Tensor | None:
        """A trained parameter beside the layer's own (installed with the method), or None."""
        return getattr(self._attn, EXTRA + name, None)

    def tell(self, name: str, value: Tensor) -> None:
        """Give a scalar that training should make small to the trainer, if one listens."""
        listening = self.context.slots.get(TOLD)
        if listening is not None:
            listening[f"{self.name}.{name}"] = value

    @property
    def native(self) -> bool:
        """Whether `softmax` is torch's own fused attention."""
        return self._layer._parallel_config is None and is_native(self._layer._attention_backend)

    def softmax(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Softmax attention by the backend the user chose.

        q (B, M, h, d), k and v (B, K, h, d) -> (B, M, h, d). `scale` defaults to the layer's own; `mask` is boolean or
        additive, broadcastable to (B, h, M, K), and not every backend takes one.
        """
        return dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            scale=self.scale if scale is None else scale,
            backend=self._layer._attention_backend,
            parallel_config=self._layer._parallel_config,
        )


class LayerProcessor:
    """What diffusers calls in one layer. A family derives from this and writes out `__call__`.

    Loading or unloading an IP-Adapter makes diffusers build new processors by calling this class without arguments.
    Such a blank one has no method; the context puts the real one back before the next layer runs.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(
        self,
        method: AttnMethod | None = None,
        context: Context | None = None,
        name: str = "",
        level: int = 0,
        stock: Any = None,
    ):
        # Both are None in a blank one only, which never gets to use them.
        self.method: AttnMethod = method  # type: ignore[assignment]
        self.context: Context = context  # type: ignore[assignment]
        self.name, self.level, self.stock = name, level, stock
        self.neutral = method is not None and method.neutral  # run the stock processor
        self.idle = False  # run the stock processor in this call; written by the method's `prepare`
        self.retired = False  # removed by its handle
        self.phase = 0  # written by the context between root calls, read inside compiled regions
        self.kept: dict[
            Any, Any
        ] = {}  # by `prepare` for this layer; not by name, which a compiler would tell layers by

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what single calls left behind."""
        return self.__dict__ | {"kept": {}}

    def project_q(self, attn: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project_k(self, attn: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project_v(self, attn: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, call: LayerCall) -> Tensor:
        return self.method.attend(call, self.phase)

    def mismatch(self, problem: str) -> None:
        """Tokens or mask do not suit the method: raise LayoutError, or warn once and let the caller run stock."""
        if self.method.on_mismatch == "raise":
            raise LayoutError(
                f"layer {self.name!r}: {problem}; leave the layer out with layers=..., or run such layers unchanged "
                "with on_mismatch='stock'."
            )
        self.context.warn_once((self.method.name, problem), f"layer {self.name!r}: {problem}; the stock layer runs.")

    def refuse_blank(self) -> NoReturn:
        raise RuntimeError(
            f"this {type(self).__name__} was made without settings and its denoiser has none of ours installed any "
            "more; set a stock processor there, or install again."
        )

    def others(self, context: Context) -> tuple[int, int]:
        """How many tokens without a place in the picture the layer sees (before, after) the picture's, in this call."""
        return 0, 0

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError
