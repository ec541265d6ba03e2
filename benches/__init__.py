"""Benchmarks: one question per file; answers are checked before they are timed."""
