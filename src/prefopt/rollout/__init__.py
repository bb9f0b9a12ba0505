"""Prompts -> sampled responses -> rewards -> preference rows."""
