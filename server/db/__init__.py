"""The service's database: tables, connections and migrations."""

from server.db.engine import Database, now
from server.db.upgrade import is_current, revision, upgrade

__all__ = ["Database", "is_current", "now", "revision", "upgrade"]
