"""The loss over lines and planes of weights: computed on a grid, stored, and drawn."""
