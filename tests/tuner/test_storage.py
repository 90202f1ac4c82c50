"""StudyStore: one suite on SQLite and on a real PostgreSQL, and each one's own failures."""

import os
import resource
import secrets
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from sqlalchemy import create_engine, event, inspect, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from tuner.errors import StorageError
from tuner.storage import Base, Storage, StudyHeader, StudyStore

HEADER = StudyHeader("model-1", "space-1", "auto", 0, {"torch": "2.13.0"})
ROOT = Path(__file__).parents[2]


def _postgres_url() -> str:
    return os.environ.get(
        "TUNER_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/test"
    ).replace("postgresql+psycopg://", "postgresql://")


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a schema of its own, dropped afterwards."""
    base = _postgres_url()
    schema = f"test_{secrets.token_hex(6)}"
    try:
        connection = psycopg.connect(base, connect_timeout=2, autocommit=True)
    except psycopg.OperationalError as error:
        pytest.skip(f"NO POSTGRESQL: set TUNER_TEST_POSTGRES to a test database's URL ({error})")
    with connection:
        connection.execute(f"CREATE SCHEMA {schema}")
        try:
            url = make_url(base).update_query_dict({"options": f"-csearch_path={schema}"})
            yield url.render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tuning.db"
    found: str = request.getfixturevalue("postgres")
    return found


def test_a_new_study_is_empty_and_named(url: str) -> None:
    store = StudyStore.open(url, None, HEADER)
    assert store.name.startswith("study-")
    assert len(store.name) == len("study-") + 8
    assert not store.resumed
    assert store.records() == []
    assert store.payload == {}
    store.close()


def test_a_resumed_study_has_what_was_stored(url: str) -> None:
    records = [
        {"number": n, "state": "complete", "plan": {"b": 1, "a": [None, 0.1 + 0.2, "ä\0\ud800"]}}
        for n in range(3)
    ]
    first = StudyStore.open(url, "mine", HEADER)
    for number in (0, 2, 1):
        first.add(number, records[number])
    first.set_payload({"damage": [1e-9, "inf"]})
    first.close()
    second = StudyStore.open(url, "mine", HEADER)
    assert second.resumed
    assert second.records() == records
    assert list(second.records()[0]["plan"]) == ["b", "a"]
    assert second.payload == {"damage": [1e-9, "inf"]}
    second.close()


def test_studies_in_one_database_do_not_mix(url: str) -> None:
    one, two = (StudyStore.open(url, name, HEADER) for name in ("one", "two"))
    one.add(0, {"who": "one"})
    two.add(0, {"who": "two"})
    two.set_payload({"who": "two"})
    assert one.records() == [{"who": "one"}]
    assert two.records() == [{"who": "two"}]
    assert one.payload == {}
    one.close()
    two.close()


def test_another_header_is_refused_naming_each_difference(url: str) -> None:
    StudyStore.open(url, "mine", HEADER).close()
    other = StudyHeader("model-1", "space-2", "auto", 7, {"torch": "2.14.0", "numpy": "2"})
    with pytest.raises(StorageError) as caught:
        StudyStore.open(url, "mine", other)
    message = str(caught.value)
    assert "space: 'space-1' -> 'space-2'" in message
    assert "seed: 0 -> 7" in message
    assert "version of torch: '2.13.0' -> '2.14.0'" in message
    assert "version of numpy: None -> '2'" in message
    assert "model-1" not in message
    assert "Choose another study_name" in message


def test_a_number_is_stored_once(url: str) -> None:
    ours, theirs = (StudyStore.open(url, "mine", HEADER) for _ in range(2))
    ours.add(1, {"who": "ours"})
    with pytest.raises(StorageError, match="another process is running this study"):
        theirs.add(1, {"who": "theirs"})
    theirs.add(2, {"who": "theirs"})
    assert [record["who"] for record in ours.records()] == ["ours", "theirs"]
    ours.close()
    theirs.close()


def test_what_is_no_strict_json_is_refused_and_nothing_lost(url: str) -> None:
    store = StudyStore.open(url, "mine", HEADER)
    store.add(0, {"accuracy": 0.9})
    for value in (float("nan"), object(), {1, 2}):
        with pytest.raises(StorageError, match="JSON"):
            store.add(1, {"accuracy": value})
    store.add(1, {"accuracy": "nan"})
    assert store.records() == [{"accuracy": 0.9}, {"accuracy": "nan"}]
    store.close()


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b"])
def test_a_name_that_cannot_be_kept_is_refused(url: str, name: str) -> None:
    with pytest.raises(StorageError, match="study_name"):
        StudyStore.open(url, name, HEADER)


def test_a_study_deleted_meanwhile_is_an_error(url: str) -> None:
    store = StudyStore.open(url, "mine", HEADER)
    engine = create_engine(make_url(url).set(drivername=_driver(url)))
    with engine.begin() as connection:
        connection.execute(Base.metadata.tables["studies"].delete())
    engine.dispose()
    with pytest.raises(StorageError, match="deleted"):
        store.add(0, {})
    with pytest.raises(StorageError):
        store.set_payload({})
    store.close()


def test_a_study_that_another_process_creates_at_the_same_moment_is_resumed(url: str) -> None:
    def create_theirs(*_: object) -> None:
        StudyStore.open(url, "mine", HEADER).close()

    event.listen(Session, "before_flush", create_theirs, once=True)
    store = StudyStore.open(url, "mine", HEADER)
    assert store.resumed
    store.close()


_OPEN_AND_ADD = """
import sys
from tuner.errors import StorageError
from tuner.storage import StudyHeader, StudyStore
store = StudyStore.open(sys.argv[1], "mine", StudyHeader("m", "s", "auto", 0))
try:
    store.add(0, {"who": sys.argv[2]})
    print("stored")
except StorageError as error:
    print("taken" if "another process" in str(error) else error)
"""


def test_of_processes_that_start_at_once_one_stores_the_trial(url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN_AND_ADD, url, str(i)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(3)
    ]
    said = sorted(process.communicate()[0].strip() for process in processes)
    assert said == ["stored", "taken", "taken"]


_ADD_AND_DIE = """
import os, signal, sys
from tuner.storage import StudyHeader, StudyStore
store = StudyStore.open(sys.argv[1], "mine", StudyHeader("m", "s", "auto", 0))
for number in range(3):
    store.add(number, {"n": number})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_trials_survive_a_kill(url: str) -> None:
    died = subprocess.run([sys.executable, "-c", _ADD_AND_DIE, url], cwd=ROOT, check=False)
    assert died.returncode == -9
    store = StudyStore.open(url, "mine", StudyHeader("m", "s", "auto", 0))
    assert store.resumed
    assert store.records() == [{"n": 0}, {"n": 1}, {"n": 2}]
    store.close()


def test_another_programs_tables_are_refused_and_left_alone(url: str) -> None:
    theirs = make_url(url).set(drivername=_driver(url)).render_as_string(hide_password=False)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(theirs)
    optuna.create_study(storage=storage, study_name="theirs")
    storage.remove_session()
    storage.engine.dispose()
    engine = create_engine(theirs)
    before = sorted(inspect(engine).get_table_names())
    with pytest.raises(StorageError, match="of another program"):
        StudyStore.open(url, "mine", HEADER)
    assert sorted(inspect(engine).get_table_names()) == before
    engine.dispose()


def test_without_a_url_nothing_outlives_the_store() -> None:
    store = StudyStore.open(None, "mine", HEADER)
    store.add(0, {"a": 1})
    store.set_payload({"b": 2})
    assert store.records() == [{"a": 1}]
    assert store.payload == {"b": 2}
    with pytest.raises(StorageError, match="stored already"):
        store.add(0, {})
    store.close()
    again = StudyStore.open(None, "mine", HEADER)
    assert not again.resumed
    assert again.records() == []
    again.close()


@pytest.mark.parametrize(
    "bad",
    [
        *("", "tuning.db", "mysql://host/x", "sqlite://host/x", "postgresql://[::1/x"),
        *("postgresql://user:secret@host:port/x", "http://example.org"),
    ],
)
def test_a_bad_url_is_refused_with_a_good_one_and_without_the_password(bad: str) -> None:
    with pytest.raises(StorageError, match="sqlite:///") as caught:
        StudyStore.open(bad, "mine", HEADER)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StorageError, match="is the server running") as caught:
        StudyStore.open("postgresql://user:secret@127.0.0.1:1/x", "mine", HEADER)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the folder must exist"):
        StudyStore.open(f"sqlite:///{tmp_path}/missing/tuning.db", "mine", HEADER)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    path.write_text("not a database " * 100)
    with pytest.raises(StorageError, match="of another kind or damaged"):
        StudyStore.open(f"sqlite:///{path}", "mine", HEADER)
    assert path.read_text() == "not a database " * 100


def test_a_database_that_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    StudyStore.open(f"sqlite:///{path}", "mine", HEADER).close()
    read_only = StudyStore.open(f"sqlite:///file:{path}?mode=ro&uri=true", "mine", HEADER)
    with pytest.raises(StorageError, match="read-only"):
        read_only.add(0, {})
    with pytest.raises(StorageError, match="read-only"):
        StudyStore.open(f"sqlite:///file:{path}?mode=ro&uri=true", "other", HEADER)
    read_only.close()


def test_a_database_that_is_locked(tmp_path: Path) -> None:
    store = StudyStore.open(f"sqlite:///{tmp_path}/tuning.db?timeout=0.1", "mine", HEADER)
    store.add(0, {"a": 1})
    holder = sqlite3.connect(tmp_path / "tuning.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="another process holds the database"):
        store.add(1, {})
    assert store.records() == [{"a": 1}]
    holder.execute("ROLLBACK")
    holder.close()
    store.add(1, {"a": 2})
    assert store.records() == [{"a": 1}, {"a": 2}]
    store.close()


def test_a_full_disk_keeps_the_trials_before(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuning.db"
    store = StudyStore.open(url, "mine", HEADER)
    store.add(0, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="same study_name"):
            store.add(1, {"text": "x" * 1_000_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    again = StudyStore.open(url, "mine", HEADER)
    assert again.records() == [{"a": 1}]
    again.add(1, {"a": 2})
    assert again.records() == [{"a": 1}, {"a": 2}]
    again.close()


def test_a_patient_store_waits_for_a_database_that_is_locked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuning.db?timeout=0.05"
    store = StudyStore.open(Storage(url, patience_s=30), "mine", HEADER)
    holder = sqlite3.connect(tmp_path / "tuning.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.5, holder.execute, ("ROLLBACK",))
    timer.start()
    store.add(0, {"a": 1})
    timer.join()
    holder.close()
    assert store.records() == [{"a": 1}]
    store.close()


def test_a_commit_whose_answer_was_lost_counts_once(url: str) -> None:
    other = StudyStore.open(url, "mine", HEADER)
    calls = []

    def guard(session: Session, number: int, record: Mapping[str, Any]) -> None:
        calls.append(number)
        if len(calls) == 1:
            other.add(number, record)
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))

    store = StudyStore.open(Storage(url, guard, patience_s=30), "mine", HEADER)
    store.add(0, {"a": 1})
    assert calls == [0, 0]
    assert store.records() == [{"a": 1}]
    other.add(1, {"a": 2})
    with pytest.raises(StorageError, match="stored already"):
        store.add(1, {"a": 3})
    store.close()
    other.close()


def test_what_the_fence_raises_keeps_everything_as_it_was(url: str) -> None:
    def fence(session: Session) -> None:
        if len(seen) == 2:
            raise PermissionError("no longer yours")
        seen.append(session)

    seen: list[Session] = []
    store = StudyStore.open(Storage(url, fence=fence), "mine", HEADER)
    store.set_payload({"a": 1})
    with pytest.raises(PermissionError):
        store.set_payload({"a": 2})
    assert store.payload == {"a": 1}
    with pytest.raises(PermissionError):
        StudyStore.open(Storage(url, fence=fence), "theirs", HEADER)
    assert not StudyStore.open(url, "theirs", HEADER).resumed
    store.close()


def test_sqlite_keeps_a_write_ahead_log_and_no_open_connection(tmp_path: Path) -> None:
    store = StudyStore.open(f"sqlite:///{tmp_path}/tuning.db", "mine", HEADER)
    store.add(0, {})
    with sqlite3.connect(tmp_path / "tuning.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.db"]
    store.close()


def test_a_header_round_trips() -> None:
    assert StudyHeader.from_dict(HEADER.to_dict()) == HEADER


def _driver(url: str) -> str:
    return "sqlite" if url.startswith("sqlite") else "postgresql+psycopg"
