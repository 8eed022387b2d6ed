"""What tests of several backbones share."""

import torch


def assert_checkpointing_changes_no_gradient(plain, lean):
    """Two models that differ only in whether they compute activations again have equal gradients, random parts too."""
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(3, 3, 32, 32)
    grads = []
    for model in (plain, lean):
        torch.manual_seed(1)
        sum(f.square().mean() for f in model(x).values()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
