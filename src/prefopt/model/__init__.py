"""Packed groups -> per-token log-probs of a transformers decoder: loading, attention, head, reference cache."""
