"""Sluice: a streaming reverse proxy for chat completions."""

__version__ = "0.1.0"
