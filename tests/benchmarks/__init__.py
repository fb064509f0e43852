"""Benchmarks: one file per arm of `reattend bench`."""

if __name__ != "reattend.bench":
    raise ImportError("import reattend.bench instead of this bare folder; first: pip install -e .")
