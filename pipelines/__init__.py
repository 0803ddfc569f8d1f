"""Transformers pipelines for Fwd2Bot (compress, retrieve, answer), the default checkpoint, the gallery, the demo."""
