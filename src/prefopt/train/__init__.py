"""Loss -> step -> checkpoint: one loop for every method, watched by observers that it does not know."""
