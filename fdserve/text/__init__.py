"""The text layer: tokenizers, chat templates, and everything that turns sampled ids back into text."""
