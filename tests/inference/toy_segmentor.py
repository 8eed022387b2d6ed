"""A segmentor of a few lines for the tests of the streams."""

import math

import torch
from torch.nn import functional as F

from the_mask.modeling.stream import NO_HINTS, Stream


class ToySegmentor(Stream):
    """Mean colours of cells through a fixed linear layer and a softmax; its memory is the running mean of past scores.

    Translation invariant by whole cells and mirror symmetric, so windows and flips must change nothing.
    """

    size_divisibility = 1
    reads_prior = True
    ignore_label = 255

    def __init__(self, num_classes=3, stride=1, memory=0.0, sharpness=0.05, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(num_classes, 3, generator=generator) * sharpness
        self.num_classes, self.score_stride, self.memory = num_classes, stride, memory
        self.pixel_mean = torch.full((3, 1, 1), 100.0)
        self.device = torch.device("cpu")
        self.sizes = []
        self.training = True

    def eval(self):
        self.training = False
        return self

    def scores(self, frame):
        assert not self.training
        self.sizes.append(tuple(frame.shape[-2:]))
        height, width = frame.shape[-2:]
        stride = self.score_stride
        image = frame.float() - self.pixel_mean
        image = F.pad(image, (0, -width % stride, 0, -height % stride))
        cells = F.avg_pool2d(image[None], stride)[0]
        assert cells.shape[-2:] == (math.ceil(height / stride), math.ceil(width / stride))
        # In steps of 1/1024: sums and means of a few such numbers are exact, however vectors are laid out.
        return (torch.einsum("kc,chw->khw", self.weight, cells).softmax(dim=0) * 1024).round() / 1024

    def init_state(self):
        return self.new_state(mean=None)

    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[-2:])
        scores = self.scores(frame)
        if hints.prior is not None:
            scores = scores + hints.prior.soften().resize(*scores.shape[-2:]).probabilities[0]
        if state["mean"] is not None:
            scores = (1 - self.memory) * scores + self.memory * state["mean"]
        return scores, {**state, "mean": scores}

    def score_maps(self, clips):
        return [torch.stack([self.scores(frame) for frame in clip.frames]) for clip in clips]
