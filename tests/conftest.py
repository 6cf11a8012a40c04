"""Settings for all tests: they must stand before torch is imported.

`QUANTKIT_HOME` is left alone: the converter's set-up is cached there, and making it takes a source
package.
"""

from __future__ import annotations

import os

# Waiting threads must sleep: busy-waiting ones starve every other process on a small machine.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import HealthCheck, settings

# The same examples every time, so that a red run stays red. To look for new ones:
# pytest --hypothesis-profile=explore
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, suppress_health_check=_QUIET)
settings.load_profile("steady")
