"""The loss on lines and planes through weight space: evaluated on a grid, stored, and drawn."""
