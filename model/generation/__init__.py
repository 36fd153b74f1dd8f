"""KV cache, decoding, sampling and incremental detokenization."""
