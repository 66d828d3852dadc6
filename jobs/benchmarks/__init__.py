"""Parts of `jobs/benchmark.py`, a file for each kind of measurement, and the peers that samray is measured against."""
