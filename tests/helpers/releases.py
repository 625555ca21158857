"""The other releases of transformers in which exports are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

OTHERS = ("4.37.2", "4.57.6", "5.0.0", "5.8.0")
# reads folders by name, in a process of its own
Reader = Callable[[dict[str, Any], Path], dict[str, Any]]
