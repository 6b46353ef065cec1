"""Scripts behind every claim about speed and memory; run them as ``python -m benchmarks.NAME`` from the repository."""
