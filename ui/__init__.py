"""The `reattend` command and its page."""

if __name__ != "reattend.ui":
    raise ImportError("import reattend.ui instead of this bare folder; first: pip install -e .")
