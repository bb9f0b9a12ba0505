"""A policy and its reference -> numbers with confidence intervals: held-out pairs, win rate, KL, diversity."""
