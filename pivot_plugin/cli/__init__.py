"""The `pivot` command. No torch is imported before a command that needs it runs."""

from .app import main

__all__ = ["main"]
