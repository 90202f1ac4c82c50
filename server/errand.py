"""What a worker tells the process of a job, and what its exit code tells the worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from server.jobs import Claim


class ExitCode(IntEnum):
    """How the process of a job ended; every other code is a crash."""

    DONE = 0  # the job has ended, and its row says how
    RETRY = 75  # disk, memory or database failed: another attempt may go well
    STOPPED = 76  # as asked, after a trial
    LEASE_LOST = 77  # somebody else holds the job
    INTERRUPTED = 130


@dataclass(frozen=True)
class Errand:
    """The job to run: the claim on it, the worker's process, and where the output goes."""

    claim: Claim
    worker_pid: int
    log: Path

    def arguments(self) -> list[str]:
        """Return the arguments of the process."""
        claim = self.claim
        numbers = (str(claim.fence), str(self.worker_pid))
        return [claim.job_id, claim.worker_id, *numbers, str(self.log)]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Errand":
        """Read what `arguments` wrote."""
        job_id, worker_id, fence, worker_pid, log = arguments
        return cls(Claim(job_id, worker_id, int(fence)), int(worker_pid), Path(log))
