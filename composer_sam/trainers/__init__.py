"""The hosts: one folder or file for each trainer that runs the training loop."""
