"""The service's settings: one place, read from the environment and validated there."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

_MIB = 1 << 20
_GIB = 1 << 30


def _database_url(url: str) -> str:
    try:
        kind = make_url(url).drivername.partition("+")[0]
    except ArgumentError as error:
        raise ValueError(
            "this is no database URL: give sqlite:///path or postgresql://user@host/database"
        ) from error
    if kind not in ("sqlite", "postgresql"):
        raise ValueError(f"{kind!r} is no database that this service knows: sqlite or postgresql")
    return url


class Settings(BaseSettings):
    """Everything that an operator may choose; each is read from `ACCUTUNE_<NAME>`.

    Times are in seconds, sizes in bytes. `database_url` defaults to SQLite in the data folder.
    """

    model_config = SettingsConfigDict(env_prefix="ACCUTUNE_", frozen=True, extra="ignore")

    data_dir: Path = Path("accutune-data")
    database_url: Annotated[str, AfterValidator(_database_url)] | None = None
    recipes_dir: Path | None = None

    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    auth: bool | None = None
    """Whether a token is needed. None: only where `host` is no loopback address."""
    session_hours: float = Field(default=12.0, gt=0)
    requests_per_minute: int = Field(default=600, gt=0)
    max_body_bytes: int = Field(default=1 * _MIB, gt=0)
    max_asset_bytes: int = Field(default=2 * _GIB, gt=0)
    asset_quota_bytes: int = Field(default=10 * _GIB, gt=0)
    max_queued_jobs: int = Field(default=10_000, gt=0)
    """Per owner."""

    lease_s: float = Field(default=30.0, gt=0)
    poll_s: float = Field(default=1.0, gt=0)
    drain_s: float = Field(default=600.0, ge=0)
    """How long a worker that was told to end waits for the running trial."""
    kill_after_s: float = Field(default=10.0, ge=0)
    memory_limit_bytes: int | None = Field(default=None, gt=0)
    """Of one job's processes together."""
    gpus: tuple[str, ...] = ()
    """Devices, such as 0 or 1, that a worker gives to its jobs, one each."""
    slots: int = Field(default=1, ge=1)
    """Jobs that one worker runs at a time."""

    keep_logs_days: float = Field(default=30.0, ge=0)
    """How long the output of ended jobs is kept; what succeeded has it as an artifact, too."""

    log_json: bool = False

    @property
    def database(self) -> str:
        """The URL of the database, spelled out."""
        if self.database_url is not None:
            return self.database_url
        return f"sqlite:///{self.data_dir.absolute() / 'accutune.db'}"

    @property
    def artifacts_dir(self) -> Path:
        """Where the files of ended jobs lie, one folder a job."""
        return self.data_dir / "artifacts"

    @property
    def assets_dir(self) -> Path:
        """Where uploads lie, named by their SHA-256."""
        return self.data_dir / "assets"

    @property
    def models_dir(self) -> Path:
        """Where the weights lie that unfinished jobs began with; workers may share it."""
        return self.data_dir / "models"

    @property
    def logs_dir(self) -> Path:
        """Where the output of every attempt at a job lies."""
        return self.data_dir / "logs"

    def environ(self) -> dict[str, str]:
        """Return the environment in which another process reads these very settings."""
        prefix = self.model_config["env_prefix"]
        values = self.model_dump(mode="json", exclude_none=True)
        values["data_dir"] = str(self.data_dir.absolute())
        return {
            f"{prefix}{name}".upper(): value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }
