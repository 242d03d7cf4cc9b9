"""Where files that were fetched once are kept on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """NAFNET_CACHE, else ~/.cache/nafnet."""
    return Path(os.environ.get("NAFNET_CACHE") or Path.home() / ".cache" / "nafnet")
