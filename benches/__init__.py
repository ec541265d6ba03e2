"""Benches: one file per question; `python -m benches` lists and runs them."""
