"""The engine: steps of any torch optimizer with gradients at perturbed weights. It needs torch only, no trainer."""
