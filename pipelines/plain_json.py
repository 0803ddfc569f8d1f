"""What JSON does not have."""

import math
from collections.abc import Mapping
from typing import Any


def without_nan(value: Any) -> Any:
    """NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
