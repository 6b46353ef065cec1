"""Any torch optimizer, stepped with gradients at perturbed weights: torch only, and no trainer known."""
