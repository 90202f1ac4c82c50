"""The dashboard: pages drawn on the server, kept live by a little JavaScript of their own."""

from server.dashboard.mounting import mount, router

__all__ = ["mount", "router"]
