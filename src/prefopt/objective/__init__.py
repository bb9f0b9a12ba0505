"""Log-probs -> loss: pure tensor functions, one formula per loss."""
