"""Routers: schedules learned by gradient descent, exported as plans."""

from .base import Recipe
from .budgeted import Budgeted
from .harmonica import HarmoniCa
from .l2c import L2C
from .router import Router
from .sdt import SDT

__all__ = ["L2C", "SDT", "Budgeted", "HarmoniCa", "Recipe", "Router"]
