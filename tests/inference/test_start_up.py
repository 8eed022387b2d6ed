"""The first label map must not wait for packages that prediction does not use."""

import subprocess
import sys

# Each adds 0.2 to 1.5 s of processor time. torch.compile comes with torchvision, and with operators that are registered
# by torch.library.custom_op.
UNUSED = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "sympy",
    "torchvision",
    "timm",
    "transformers",
    "huggingface_hub",
    "scipy",
    "onnx",
    "tensorboard",
)
PROGRAM = """
import sys
import numpy as np
import the_mask
segmentor = the_mask.load("street-live", backend="eager")
labels, state = segmentor.step(np.zeros((64, 96, 3), np.uint8), segmentor.init_state())
assert tuple(labels.shape) == (64, 96), labels.shape
print(*[name for name in sys.argv[1:] if name in sys.modules])
"""


def test_a_label_map_needs_few_packages():
    command = [sys.executable, "-c", PROGRAM, *UNUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
