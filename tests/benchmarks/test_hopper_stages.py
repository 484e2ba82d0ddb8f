"""Each stage that the benchmark leaves out is still where it says in the kernels' source."""

from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

from benchmarks.hopper_stages import BACKWARD, FORWARD, variant
from fm_longctx.kernels.hopper import backward, forward


@pytest.mark.parametrize("module, stages", [(forward, FORWARD), (backward, BACKWARD)], ids=["forward", "backward"])
def test_every_stage_is_found(module, stages, tmp_path):
    kernels = [variant(module, changes, tmp_path) for changes in stages.values()]
    # "no dQ" is a form of the kernel as it is.
    assert len({Path(kernel.__file__).read_text() for kernel in kernels}) == len(stages) - ("no dQ" in stages)


def test_a_stage_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no 'softermax' any more"):
        variant(forward, (("softermax", ""),), tmp_path)
