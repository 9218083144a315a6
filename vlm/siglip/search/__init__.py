"""Search over stored vectors: exact, or through an index for other engines; rankings fused, entries filtered."""
