"""Nouns that every layer shares: config, errors, events, run folder, loss facts. Imports no torch."""
