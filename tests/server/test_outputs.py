"""The files of a job come to their place together with its end, or not at all."""

from pathlib import Path

import pytest

from server.errors import LeaseLostError
from server.jobs import Claim, Ending, Jobs
from server.outputs import Outputs
from server.states import State
from tests.server.helpers import claimed, submission

_ENDING = Ending(None, 0.9, True, 1, "max_trials")


@pytest.fixture
def claim(jobs: Jobs) -> Claim:
    """A job that is held."""
    jobs.submit(submission(), "local")
    return claimed(jobs)


def _staged(folder: Path, claim: Claim, text: str) -> Outputs:
    staged = folder / f".{claim.job_id}-{claim.fence}"
    staged.mkdir(parents=True)
    (staged / "plan.json").write_text(text)
    return Outputs(folder, claim.job_id, claim.fence)


def test_who_lost_the_job_publishes_nothing(jobs: Jobs, claim: Claim, tmp_path: Path) -> None:
    late = _staged(tmp_path, claim, "late")
    jobs.release(claim)
    second = claimed(jobs, "other")
    jobs.succeed(second, _ENDING, (), _staged(tmp_path, second, "first").publish)
    with pytest.raises(LeaseLostError):
        jobs.succeed(claim, _ENDING, (), late.publish)
    assert (tmp_path / claim.job_id / "plan.json").read_text() == "first"
    late.discard()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_job_whose_files_cannot_be_moved_has_not_ended(jobs: Jobs, claim: Claim) -> None:
    def publish() -> None:
        raise OSError(28, "No space left on device")

    artifact = {"name": "a", "media_type": "b", "size_bytes": 1, "sha256": "c"}
    with pytest.raises(OSError, match="No space left"):
        jobs.succeed(claim, _ENDING, [artifact], publish)
    assert jobs.get(claim.job_id).state == State.RUNNING
    jobs.succeed(claim, _ENDING, [artifact], lambda: None)
    assert jobs.get(claim.job_id).state == State.SUCCEEDED


def test_what_an_attempt_left_that_was_not_committed_is_replaced(
    jobs: Jobs, claim: Claim, tmp_path: Path
) -> None:
    (tmp_path / claim.job_id).mkdir()
    (tmp_path / claim.job_id / "old.json").touch()
    _staged(tmp_path, claim, "new").publish()
    assert [path.name for path in (tmp_path / claim.job_id).iterdir()] == ["plan.json"]
