"""Building a corpus: sources are read, split, tokenized and cached, once for all runs."""
