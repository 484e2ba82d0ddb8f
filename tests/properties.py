"""How many examples the property tests draw. HYPOTHESIS_PROFILE chooses: `ci` (the default) or `nightly`.

`ci` draws the same examples on every run, hundreds a test (tens where Triton's interpreter runs them), so that a red
test is red for everyone. `nightly` draws others each time, twenty times as many; a failure is kept in `.hypothesis` and
printed as a line that repeats it. It needs longer than the suite's limit a test:

    HYPOTHESIS_PROFILE=nightly python -m pytest tests/mask tests/attention/test_properties.py --timeout=0
"""

import os

from hypothesis import settings

_CI = 100

settings.register_profile("ci", max_examples=_CI, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=20 * _CI, derandomize=False, deadline=None, print_blob=True)


def load_profile() -> None:
    """Make the profile that HYPOTHESIS_PROFILE names the one of tests defined from now on."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def examples(in_ci: int) -> int:
    """`max_examples` of a test that draws this many in the `ci` profile, in proportion in others."""
    return in_ci * settings.default.max_examples // _CI
