"""Measure a model: retrieval, MEXA, perplexity, exact match, answer language, and intervals around all of them."""
