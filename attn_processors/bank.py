"""The bank: tokens and texts of references, kept from an earlier run of the same steps, within a budget of bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .ops.regions import Box

__all__ = ["Bank", "Source"]


@dataclass(frozen=True, eq=False)
class Source:
    """One reference of one subject: its tokens in its own picture."""

    number: int  # among the method's references
    tokens: Tensor  # bool (h, w)
    box: Box


@dataclass
class Bank:
    """Tokens of reference rows kept from an earlier run of the same steps, within a budget of bytes.

    Attributes:
        limit: most bytes it may hold; None = no limit.
        every_layer, every_step: 2 keeps every second one; steps between reuse the one before.
        branches: "both", or "cond" for the rows with the prompt alone.
        held: bytes so far.
        missing: times a layer found nothing and ran without references.
    """

    limit: int | None = None
    every_layer: int = 1
    every_step: int = 1
    branches: str = "both"
    held: int = 0
    missing: int = 0
    entries: dict[tuple, tuple[Tensor, Source]] = field(default_factory=dict)
    texts: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by branch (from the last) and reference

    def keeps(self, layer: int, step: int) -> bool:
        """Whether tokens of this layer and step are for the bank."""
        return layer % self.every_layer == 0 and step % self.every_step == 0

    def moment(self, step: int) -> int:
        """The step whose tokens are read in `step`."""
        return step - step % self.every_step

    def put(self, key: tuple, x: Tensor, source: Source) -> None:
        """Keep the tokens of one reference, (n, C). Raises MemoryError over the budget."""
        self._hold(x)
        self.entries[key] = (x, source)

    def put_text(self, key: tuple[int, int], text: Tensor) -> None:
        """Keep the text of one reference, (T, C'). Raises MemoryError over the budget."""
        self._hold(text)
        self.texts[key] = text

    def _hold(self, x: Tensor) -> None:
        if self.limit is not None and self.held + x.nbytes > self.limit:
            raise MemoryError(
                f"the bank of references would hold {self.held + x.nbytes:,} bytes, {self.limit:,} are allowed; allow "
                "more (max_bytes), use fewer steps or smaller pictures, or keep references as rows."
            )
        self.held += x.nbytes

    def get(self, key: tuple) -> Tensor | None:
        """Tokens on the whole grid of their picture, zeros where the subject is not, (1, h * w, C); None: not kept."""
        if key not in self.entries:
            return None
        x, source = self.entries[key]
        whole = x.new_zeros(1, source.tokens.numel(), x.shape[-1])
        whole[0, source.tokens.flatten().to(x.device)] = x
        return whole
