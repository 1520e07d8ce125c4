import os
import subprocess
import sys

from trtforge.runtime.device import device_facts, gpu_present


def test_facts_and_presence_agree():
    facts = device_facts()
    assert gpu_present() is (facts is not None)
    if facts is not None:
        assert facts.sm_count > 0
        assert facts.memory_bytes > 1 << 30
        assert facts.compute_capability.replace(".", "").isdigit()


def test_no_visible_gpu_is_none_without_noise_or_torch():
    code = (
        "import sys; from trtforge.runtime.device import device_facts; assert device_facts() is None; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=True
    )
    assert done.stdout == done.stderr == b""
