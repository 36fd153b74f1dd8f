"""Text to tokens: sources are read, split, tokenized and cached, once for all runs."""
