"""What attention computes in a stock diffusers model, and putting it there."""

if __name__ != "reattend.attn_processors":
    raise ImportError("import reattend.attn_processors instead of this bare folder; first: pip install -e .")
