"""A run folder as one self-contained HTML page, as Markdown, as JSON, and as a line of a list. Imports no torch."""
