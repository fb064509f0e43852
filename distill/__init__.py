"""The trainer that turns a pretrained model into a linear one (to come)."""

if __name__ != "reattend.distill":
    raise ImportError("import reattend.distill instead of this bare folder; first: pip install -e .")
