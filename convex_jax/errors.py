"""How a run can end before it is done: exceptions, each with its exit code."""


class Ended(Exception):
  """A run that ends early; `main` prints the message and exits with `code`."""

  code: int
  at_once = False  # Whether threads may wait for ever for what does not come.


class UserError(Ended, ValueError):
  """Invalid input: what is wrong, where, what is expected, how to fix it. Do not retry."""

  code = 2


class Diverged(Ended):
  """Too many updates in a row that could not be made; the last checkpoint is finite."""

  code = 3


class NotProved(Ended):
  """A network that was to be proved convex and is not."""

  code = 4


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
