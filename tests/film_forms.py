"""The form of the tab for long videos as tests fill it in."""

from __future__ import annotations

from reattend.ui import film_form as forms

MODEL = "tiny"
PICTURE_FIELDS = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype")
SMALL = {"steps": 2, "width": "24", "height": "16", "frames": 7, "seed": "5", "later": "3: a blue cat"}
SMALL |= {"dual-scope.window": "4", "dual-scope.anchors": 2}


def film_form(**changes):
    """The tab's form as it stands when the page opens, with changes."""
    values = dict.fromkeys(PICTURE_FIELDS, "") | {"prompt": "a car", "model": MODEL, "steps": 20}
    values |= {"frames": 64, "fps": 8, "later": "", "blend": 0, "given": {}} | dict.fromkeys(forms.SCALES, "")
    values |= {f"dual-scope.{s.name}": s.default for s in forms.SETTINGS}
    return values | changes
