"""Settings for all tests: they must stand before torch is imported.

`QUANTKIT_HOME` is left alone: the converter's set-up is cached there, and making it takes a source
package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Waiting threads must sleep: busy-waiting ones starve every other process on a small machine.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from commands import Answer, Run

# The same examples every time, so that a red run stays red. To look for new ones:
# pytest --hypothesis-profile=explore
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, suppress_health_check=_QUIET)
settings.register_profile(
    "fast", max_examples=20, deadline=None, derandomize=True, suppress_health_check=_QUIET
)
settings.load_profile("steady")


def pytest_configure(config: pytest.Config) -> None:
    """`make test` tries fewer examples: 20 where the whole suite tries 100."""
    if "not slow" in config.option.markexpr and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


# The one whole run that tests of the pipeline share. Imports wait until a test asks for it.


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 96, which only types of 32-blocks take, but for ffn_down with its 256."""
    from tiny_models import tiny_llama

    return tiny_llama(
        tmp_path_factory.mktemp("models") / "Tiny-Llama",
        hidden_size=96,
        intermediate_size=256,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.1,
    )


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a command that reaches no Hub."""
    from commands import environment

    return environment(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def whole_run(
    tiny_checkpoint: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Answer]:
    """A finished run, not to be changed, and what the command answered."""
    from commands import CHEAP, Run, quantkit

    folder = tmp_path_factory.mktemp("runs") / "whole"
    answer = quantkit("run", tiny_checkpoint, "--out", folder, *CHEAP, "--json", env=offline)
    assert answer.code == 0, answer.err
    return Run(folder), answer


@pytest.fixture(autouse=True)
def _no_account_is_known() -> None:
    """The names of accounts are kept for a while; every test has a Hub of its own."""
    jobs = sys.modules.get("quantkit.hub.jobs")
    if jobs is not None:
        jobs._accounts.clear()
