"""Judges: what compares two responses to a prompt, or marks one."""
