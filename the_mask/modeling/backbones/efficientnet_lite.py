"""EfficientNet-Lite 0 to 4 with timm's names, but without timm, whose import takes a second.

For models that are filled from a file of their own, such as those that come with the library: state-dict keys and
results are those of timm's ``efficientnet_liteN`` and ``tf_efficientnet_liteN``. Source: Tan and Le 2019,
"EfficientNet", with the changes of the released Lite models (no squeeze-and-excitation, ReLU6, stem not scaled).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.backbones.common import LEVELS, PyramidBackbone
from the_mask.modeling.backbones.depthwise import SameConv2d, speed_up_depthwise

# Width and depth of the variants, times those of Lite0.
SCALES = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2), "lite3": (1.2, 1.4), "lite4": (1.4, 1.8)}
STEM = 32
# Stages whose outputs are res2 ... res5.
OUTPUTS = (1, 2, 4, 6)


@dataclass(frozen=True)
class Stage:
    """Blocks of one size of map: their number in Lite0, kernel, stride of the first, expansion, channels in Lite0."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def is_lite(name: str) -> bool:
    """Whether ``name`` is one of the models here."""
    return name.removeprefix("tf_").removeprefix("efficientnet_") in SCALES and "efficientnet_" in name


class _Block(nn.Module):
    """Expand (but in the first stage), depthwise, project; with the input added where shapes allow it."""

    def __init__(self, channels: int, out: int, stage: Stage, stride: int, tf: bool) -> None:
        super().__init__()
        wide = channels * stage.expansion
        self.expands = stage.expansion > 1
        self.skips = stride == 1 and channels == out
        if self.expands:
            self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
            self.bn1 = _norm(wide, tf)
        self.conv_dw = _conv(wide, wide, stage.kernel, stride, tf, groups=wide)
        # timm numbers the norms of a block and names projections by whether something expands before them.
        last = nn.Conv2d(wide, out, 1, bias=False)
        if self.expands:
            self.bn2, self.conv_pwl, self.bn3 = _norm(wide, tf), last, _norm(out, tf)
        else:
            self.bn1, self.conv_pw, self.bn2 = _norm(wide, tf), last, _norm(out, tf)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expands:
            y = F.relu6(self.bn1(self.conv_pw(y)), inplace=True)
            y = F.relu6(self.bn2(self.conv_dw(y)), inplace=True)
            y = self.bn3(self.conv_pwl(y))
        else:
            y = F.relu6(self.bn1(self.conv_dw(y)), inplace=True)
            y = self.bn2(self.conv_pw(y))
        return y + x if self.skips else y


class _Net(nn.Module):
    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        width, depth = SCALES[name.rpartition("_")[2]]
        tf = name.startswith("tf_")
        self.conv_stem = _conv(in_channels, STEM, 3, 2, tf)
        self.bn1 = _norm(STEM, tf)
        channels, stages = STEM, []
        self.channels = [_rounded(stage.channels * width) for stage in STAGES]
        for i, (stage, out) in enumerate(zip(STAGES, self.channels, strict=True)):
            # The first and the last stage are not made deeper.
            count = stage.blocks if i in (0, len(STAGES) - 1) else math.ceil(stage.blocks * depth)
            blocks = []
            for j in range(count):
                blocks.append(_Block(channels, out, stage, stage.stride if j == 0 else 1, tf))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu6(self.bn1(self.conv_stem(x)), inplace=True)
        outputs = []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in OUTPUTS:
                outputs.append(x)
        return outputs


class EfficientNetLite(PyramidBackbone):
    """Images [B, C, H, W] to ``res2`` ... ``res5``.

    Args:
        name: ``efficientnet_lite0`` ... ``efficientnet_lite4``; with ``tf_`` before it, padding and epsilon are
            TensorFlow's.
        in_channels: channels of the images.
    """

    def __init__(self, name: str, in_channels: int = 3) -> None:
        net = _Net(name, in_channels)
        super().__init__([net.channels[i] for i in OUTPUTS])
        speed_up_depthwise(net)
        self.model = net

    @property
    def size_divisibility(self) -> int:
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(LEVELS, self.model(x), strict=True))


def _conv(channels: int, out: int, kernel: int, stride: int, tf: bool, groups: int = 1) -> nn.Conv2d:
    if tf and stride > 1:
        return SameConv2d(channels, out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _norm(channels: int, tf: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3 if tf else 1e-5)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least nine tenths of ``channels``."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
