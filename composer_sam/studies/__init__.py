"""Several runs side by side: compared, studied over grids of values, and measured from their checkpoints."""
