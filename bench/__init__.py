"""Measurements: `python -m bench quick`.  Nothing here is a test; docs/performance.md tells what the numbers mean."""
