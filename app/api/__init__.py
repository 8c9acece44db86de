"""The HTTP face: translates, decides nothing."""

from app.api.install import install
from app.api.options import ApiOptions

__all__ = ["ApiOptions", "install"]
