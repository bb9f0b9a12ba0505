"""Packages that only some options need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from prefopt.core.errors import ConfigError


def check_installed(package: str, *, extra: str, option: str) -> None:
    """ConfigError where `package`, which `option` needs and the extra `extra` of this project installs, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option} needs the package {package}, which is not installed",
            todo=f"pip install 'prefopt[{extra}]', or remove {option.partition('=')[0]}.",
        )


def needed(package: str, *, extra: str, option: str) -> Any:
    """The module `package`; ConfigError as above, and where it is there and does not load."""
    check_installed(package, extra=extra, option=option)
    try:
        return importlib.import_module(package)
    except Exception as error:  # a package with compiled parts raises many kinds where these do not fit
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"{option}: the package {package} does not load ({line})",
            todo=f"Install one that fits this machine, or remove {option.partition('=')[0]}.",
        ) from error
