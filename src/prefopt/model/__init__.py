"""Packed groups -> per-token log-probs of a transformers decoder: loading, attention, head, reference cache."""

from prefopt.model.allocator import align_to_pages

align_to_pages()  # before anything here makes torch allocate
