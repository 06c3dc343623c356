"""How a run can end before it is done: exceptions, each with its exit code."""


class Ended(Exception):
  """A run that ends early; `main` prints the message and exits with `code`."""

  code: int
  at_once = False  # Whether threads may wait for ever for what does not come.


class Mistake(Ended, ValueError):
  """The user's: what is wrong, where, what is allowed, the cure. Do not retry."""

  code = 2


class Diverged(Ended):
  """Too many updates in a row that could not be made; the last checkpoint is finite."""

  code = 3


class Unsaved(Ended):
  """A checkpoint that the storage would not take; those before it are as they were."""

  code = 74
  at_once = True


class Lost(Ended):
  """Another process of the run is gone: the same command everywhere goes on."""

  code = 75
  at_once = True


class Stopped(Ended):
  """Asked to stop, and saved: the same command goes on from there."""

  code = 75


def refuse_url(flag: str, path: str) -> None:
  """Raises `Mistake` for a bucket's address: records are read at random, from a file system."""
  if "://" in path:
    bucket, _, rest = path.split("://", 1)[1].partition("/")
    raise Mistake(
      f"{flag}={path} is no folder of this machine; mount the bucket on every host"
      f" (gcsfuse {bucket} /mnt/{bucket}), then {flag}=/mnt/{bucket}/{rest}"
    )
