"""How many examples hypothesis tries: all of them in `make test-all`, a fifth in `make test`."""

from __future__ import annotations

from hypothesis import settings


def examples(n: int) -> settings:
    """Settings for `n` examples in the whole suite, in proportion to what the profile of this run
    allows. conftest chooses the profile before any test is imported.
    """
    return settings(max_examples=max(4, n * settings.default.max_examples // 100))
