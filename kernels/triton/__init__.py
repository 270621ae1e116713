"""Triton kernels, one file per op; `dynabert_fast.ops.triton` makes them a backend."""
