"""How messages write a size of memory or of a file."""

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def format_size(size: float, digits: int = 1) -> str:
    """In the largest unit in which at least a tenth is left, so that a small size is not "0.0 GB"."""
    for unit, name in UNITS:
        if size >= unit / 10:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} bytes"
