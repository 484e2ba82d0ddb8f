"""Run a Megatron script on CPUs: `torchrun ... tests/integrations/megatron/on_cpu.py script.py [arguments]`."""

import runpy
import sys
import warnings

from tests.integrations.megatron.cpu import megatron_on_cpu

# Checkpoints are written by processes that import this module anew.
if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.argv = sys.argv[1:]
    with megatron_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
