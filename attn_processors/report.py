"""What is installed where, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer of a `Report`. state: "active", "neutral", "removed", or "replaced by X"."""

    model: str
    name: str
    role: str
    level: int
    heads: int
    width: int
    method: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is installed where, at the time of asking. `print` it, or take `to_json`."""

    methods: tuple[dict[str, Any], ...]  # name and settings
    layers: tuple[LayerReport, ...]
    outlook: tuple[str, ...] = ()  # what it is expected to save, where a method can tell

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        lines = []
        for method in self.methods:
            settings = ", ".join(f"{key}={value!r}" for key, value in method.items() if key != "name")
            lines.append(f"{method['name']} ({settings})")
            lines += [
                f"  {layer.name}  level {layer.level}, {layer.heads} heads, width {layer.width}: {layer.state}"
                for layer in self.layers
                if layer.method == method["name"]
            ]
        return "\n".join([*lines, *self.outlook])
