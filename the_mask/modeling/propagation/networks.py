"""The three small networks of GSVNet: flow, intra-frame segmentation, guide.

Axes: B frames, C classes, K filter slots, h w cells of the working grid (1/8 of the frame). Parameter names are those
of the released checkpoints, sizes those of the released code (186,402 + 15,763 + 194,241 parameters for 19 classes and
11 slots).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.backbones.swiftnet_resnet18 import make_norm

FLOW_SLOPE = 0.1
WIDTH = 32


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Convolution with bias that keeps the size at stride 1; Xavier-normal weights as released."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation)
    nn.init.xavier_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class LightFlowNet(nn.Module):
    """Optical flow between two small frames at a quarter of their size, with a pyramid of dilated convolutions."""

    def __init__(self, norm: str = "BN") -> None:
        super().__init__()
        self.conv1 = self._block(6, 32, norm, stride=2)
        self.conv2 = self._block(32, 64, norm, stride=2)
        self.conv_dilate_1 = self._block(64, 64, norm, dilation=1)
        self.conv_dilate_2 = self._block(64, 64, norm, dilation=2)
        self.conv_dilate_3 = self._block(64, 64, norm, dilation=4)
        self.conv_dilate_4 = self._block(64, 64, norm, dilation=8)
        self.conv_merge = self._block(256, 64, norm, kernel=1)
        self.toflow = _conv(64, 2)

    @staticmethod
    def _block(
        in_channels: int, out_channels: int, norm: str, kernel: int = 3, stride: int = 1, dilation: int = 1
    ) -> nn.Sequential:
        conv = _conv(in_channels, out_channels, kernel, stride, dilation)
        return nn.Sequential(conv, make_norm(norm, out_channels), nn.LeakyReLU(FLOW_SLOPE))

    def forward(self, frame: Tensor, previous: Tensor) -> Tensor:
        """Displacement from ``frame`` to ``previous``.

        Args:
            frame, previous: normalised, [B, 3, h, w].

        Returns:
            [B, 2, h, w] in cells: horizontal, vertical. The network's output, resized without scaling its values, is
            divided by 4; its weights contain that constant (released code).
        """
        x = self.conv2(self.conv1(torch.cat([frame, previous], dim=1)))
        levels = [self.conv_dilate_1(x)]
        for dilated in (self.conv_dilate_2, self.conv_dilate_3, self.conv_dilate_4):
            levels.append(dilated(x) + levels[-1])
        return _resize(self.toflow(self.conv_merge(torch.cat(levels, dim=1)) + x), frame) / 4


class IntraNet(nn.Module):
    """Segments a small frame on its own: two hidden convolutions and a linear one."""

    def __init__(self, num_classes: int, norm: str = "BN") -> None:
        super().__init__()
        self.intra_net = nn.Sequential(
            _conv(3, WIDTH),
            make_norm(norm, WIDTH),
            nn.ReLU(),
            _conv(WIDTH, WIDTH),
            make_norm(norm, WIDTH),
            nn.ReLU(),
            _conv(WIDTH, num_classes),
        )

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Frame [B, 3, h, w] -> features [B, 32, h, w] and class logits [B, C, h, w]."""
        features = self.intra_net[:-1](frame)
        return features, self.intra_net[-1](features)


class GuideNet(nn.Module):
    """Raw filter weights from the intra maps of the present frame and the edges of the warped segmentation."""

    def __init__(self, in_channels: int, slots: int, norm: str = "BN") -> None:
        """
        Args:
            in_channels: channels of the input: intra maps, if any, and the edge map.
            slots: K.
            norm: see ``get_norm``.
        """
        super().__init__()
        self.guide_conv = nn.Sequential(_conv(in_channels, 32), make_norm(norm, 32), nn.ReLU())
        self.guide_conv_feat = nn.Sequential(
            *(_conv(32, 64, stride=2), make_norm(norm, 64), nn.ReLU()),
            *(_conv(64, 128, stride=2), make_norm(norm, 128), nn.ReLU()),
        )
        # The released module has a x2 upsampling at 0 and 4. Here maps are resized to the map they are joined with, so
        # that any size works, and these two indices stay empty.
        self.guide_deconv = nn.Sequential(
            *(nn.Identity(), _conv(128, 64), make_norm(norm, 64), nn.ReLU()),
            *(nn.Identity(), _conv(64, 32), make_norm(norm, 32), nn.ReLU()),
        )
        self.guide_decoder = nn.Sequential(_conv(32, slots), make_norm(norm, slots))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> [B, K, h, w], not normalised."""
        fine = self.guide_conv(x)
        half = self.guide_conv_feat[:3](fine)
        quarter = self.guide_conv_feat[3:](half)
        up = self.guide_deconv[1:4](_resize(quarter, half))
        up = self.guide_deconv[5:](_resize(up, fine))
        return self.guide_decoder(up + fine)
