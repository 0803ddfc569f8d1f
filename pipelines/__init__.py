"""Transformers pipelines for Fwd2Bot: compress, retrieve, answer."""
