"""Runs side by side: compared, studied over grids of values, and measured at their checkpoints."""
