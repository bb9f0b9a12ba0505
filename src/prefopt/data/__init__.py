"""Rows from files or the Hub -> groups -> token ids; audit and packing plan. Imports no torch."""
