"""What the routes work with: one of each, opened together."""

from dataclasses import dataclass

from server.assets import Assets
from server.catalog import Catalog
from server.db import Database, upgrade
from server.hub import Hub
from server.jobs import Jobs
from server.metrics import Metrics
from server.sessions import Sessions
from server.settings import Settings
from server.tokens import Tokens
from server.trials import Trials


@dataclass(frozen=True)
class Services:
    """Everything behind the routes; `app.state.services` while the application runs."""

    settings: Settings
    database: Database
    jobs: Jobs
    trials: Trials
    catalog: Catalog
    tokens: Tokens
    sessions: Sessions
    assets: Assets
    metrics: Metrics
    hub: Hub

    @classmethod
    def open(cls, settings: Settings) -> "Services":
        """Connect to the database, which is brought up to date first where it is SQLite."""
        database = Database(settings.database)
        if database.is_sqlite:
            upgrade(database)
        jobs = Jobs(database)
        tokens, hub = Tokens(database), Hub(jobs)
        return cls(
            settings=settings,
            database=database,
            jobs=jobs,
            trials=Trials(database),
            catalog=Catalog.load(settings.recipes_dir),
            tokens=tokens,
            sessions=Sessions(settings, tokens),
            assets=Assets(database, settings),
            metrics=Metrics(database, settings.lease_s, lambda: hub.watched),
            hub=hub,
        )

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()
