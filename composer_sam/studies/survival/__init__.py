"""What trained language models lose to fine-tuning on other text, quantisation and noise."""
