"""The job that an abbreviated id means."""

from server.client import Client, ClientError
from server.schemas import Job

_FULL = 26
_SHORTEST = 4
_SHOWN = 5


def resolved(client: Client, given: str) -> Job:
    """Return the one job whose id ends, or begins, with what was given.

    Ids begin with the time, so that it is their ends that differ. Raises ClientError where several
    jobs fit or none does.
    """
    text = given.lower()
    if len(text) >= _FULL:
        return client.job(text)
    if len(text) < _SHORTEST:
        raise ClientError(f"{given!r} is too short: give {_SHORTEST} characters of the id or more")
    found = [job for job in client.jobs() if job.id.endswith(text) or job.id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ClientError(f"no job has an id that ends or begins with {given!r}: see `tuner jobs`")
    ids = ", ".join(job.id for job in found[:_SHOWN])
    raise ClientError(f"{len(found)} jobs have an id that ends or begins with {given!r}: {ids}")
