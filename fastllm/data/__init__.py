"""Text to tokens and back, chat templates, batches and the curation of training data."""
