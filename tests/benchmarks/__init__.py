"""Benchmarks: one file per word of `reattend bench`; `frame`, `rounds` and `measure` are what they share."""

if __name__ != "reattend.bench":
    raise ImportError("import reattend.bench instead of this bare folder; first: pip install -e .")
