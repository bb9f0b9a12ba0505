"""`python -m prefopt` is the command prefopt."""

from __future__ import annotations

from prefopt.cli import main

main()
