"""What several tests share."""

import os
import pathlib

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[2]
# A folder of prepared data sets, for tests that look at real photographs; skipped without.
SHARED_DATA = pathlib.Path(os.environ.get("CONVEX_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))
# Seconds for what ends by itself within a few, on a machine many times as slow: no more than a
# way to tell a hang.
PATIENCE = 900


def of(config: ConfigDict, **changes) -> ConfigDict:
  """A copy of a config with some keys changed; `optimizer__name="sgd"` sets a nested one."""
  copy = ConfigDict(config.to_dict())
  copy.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return copy
