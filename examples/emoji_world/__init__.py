"""The emoji world: pictures whose content is known, their captions, and the reader that judges them."""

if __name__ != "reattend.emoji_world":
    raise ImportError("import reattend.emoji_world instead of this bare folder; first: pip install -e .")
