"""Benchmarks; run `python -m benchmarks.NAME` from the checkout."""
