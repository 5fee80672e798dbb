"""Ours beside a named baseline, in one run; the last line printed is one JSON document."""
