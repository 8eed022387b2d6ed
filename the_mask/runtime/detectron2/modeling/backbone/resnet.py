"""ResNet with Detectron2's parameter names: ``stem.conv1``, ``res2.0.conv1.norm``, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...config import CfgNode
from ...layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from .backbone import Backbone
from .build import BACKBONE_REGISTRY

ResNetBlockBase = CNNBlockBase

# Depth of the network: blocks in res2 ... res5.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, **kwargs: Any) -> Conv2d:
    """Convolution without bias, with norm, padded so that stride 1 keeps the size."""
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=padding,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )


def _init_like_msra(*layers: Conv2d | None) -> None:
    # He initialisation by fan-out, as in the original ResNet; the same draws as fvcore's c2_msra_fill.
    for layer in layers:
        if layer is not None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class BasicStem(CNNBlockBase):
    """7x7 convolution of stride 2 and 3x3 max pooling of stride 2: [N,C,H,W] -> [N,out_channels,H/4,W/4]."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.in_channels = in_channels
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        _init_like_msra(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class BasicBlock(CNNBlockBase):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, stride)
        # The order of construction fixes the order of random draws and of state-dict keys.
        self.shortcut = (
            _conv(in_channels, out_channels, 1, norm, stride=stride) if in_channels != out_channels else None
        )
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        _init_like_msra(self.conv1, self.conv2, self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(CNNBlockBase):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and deeper)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        """Put the stride into the first 1x1 convolution (weights of Caffe origin) or into the 3x3 one (torchvision).

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            bottleneck_channels: channels of the 3x3 convolution.
            stride: of the block.
            num_groups: groups of the 3x3 convolution.
            norm: see ``get_norm``.
            stride_in_1x1: where the stride is.
            dilation: of the 3x3 convolution.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = (
            _conv(in_channels, out_channels, 1, norm, stride=stride) if in_channels != out_channels else None
        )
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(
            bottleneck_channels, bottleneck_channels, 3, norm, stride=stride_3x3, groups=num_groups, dilation=dilation
        )
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
        _init_like_msra(self.conv1, self.conv2, self.conv3, self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ResNet(Backbone):
    """A stem, stages ``res2`` to ``res5``, and optionally a classifier ``linear``."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Stages that no output needs are left out.

        Args:
            stem: first block, with ``stride`` and ``out_channels``.
            stages: blocks of each stage.
            num_classes: adds average pooling and a linear layer.
            out_features: names among ``stem``, ``res2`` ..., ``linear``; the last layer by default.
            freeze_at: see ``freeze``.
        """
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        stride: int = stem.stride  # type: ignore[assignment]
        channels: int = stem.out_channels  # type: ignore[assignment]
        self._out_feature_strides = {"stem": stride}
        self._out_feature_channels = {"stem": channels}
        if out_features is not None:
            # As upstream, "linear" does not count as a need for the last stage.
            needed = {"res2": 1, "res3": 2, "res4": 3, "res5": 4}
            stages = stages[: max(needed.get(name, 0) for name in out_features)]
        self.stage_names: tuple[str, ...] = ()
        self.stages: list[nn.Sequential] = []
        for number, blocks in enumerate(stages, start=2):
            assert len(blocks) > 0, f"stage res{number} has no block"
            for block in blocks:
                assert isinstance(block, CNNBlockBase), block
                stride *= block.stride
            channels = blocks[-1].out_channels
            name = f"res{number}"
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stage_names += (name,)
            self.stages.append(stage)
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        last = self.stage_names[-1] if self.stage_names else "stem"
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            # Goyal et al. 2017, section 5.1: the classifier starts with a standard deviation of 0.01.
            nn.init.normal_(self.linear.weight, std=0.01)
            last = "linear"
        self._out_features = [last] if out_features is None else list(out_features)
        assert len(self._out_features) > 0
        children = [name for name, _ in self.named_children()]
        for name in self._out_features:
            assert name in children, f"Available children: {', '.join(children)}; asked for {name}"
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [N,C,H,W] to features by name."""
        assert x.dim() == 4, f"ResNet takes an input of shape (N, C, H, W). Got {x.shape} instead!"
        outputs = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        if self.num_classes is not None:
            x = self.linear(self.avgpool(x).flatten(1))
            if "linear" in self._out_features:
                outputs["linear"] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> nn.Module:
        """Freeze the first parts: 1 is the stem, 2 is the stem and res2, and so on. Return the network."""
        if freeze_at >= 1:
            self.stem.freeze()  # type: ignore[operator]
        for number, stage in enumerate(self.stages, start=2):
            if freeze_at >= number:
                for block in stage.children():
                    block.freeze()  # type: ignore[operator]
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase], num_blocks: int, *, in_channels: int, out_channels: int, **kwargs: Any
    ) -> list[CNNBlockBase]:
        """Return the blocks of one stage.

        Args:
            block_class: class of all blocks.
            num_blocks: how many.
            in_channels: of the first block; the others take ``out_channels``.
            out_channels: of every block.
            kwargs: further arguments of the class; ``x_per_block`` is a list with the ``x`` of each block.
        """
        shared = {name: value for name, value in kwargs.items() if not name.endswith("_per_block")}
        listed = {name: value for name, value in kwargs.items() if name.endswith("_per_block")}
        for name, values in listed.items():
            assert len(values) == num_blocks, (
                f"Argument '{name}' of make_stage should have the same length as num_blocks"
            )
            assert name[: -len("_per_block")] not in kwargs, (
                f"Cannot call make_stage with both {name} and its short form"
            )
        blocks = []
        for index in range(num_blocks):
            own = {name[: -len("_per_block")]: values[index] for name, values in listed.items()}
            blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **own, **shared))
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Return the four stages of ResNet-18, -34, -50, -101 or -152.

        Args:
            depth: one of these numbers.
            block_class: ``BasicBlock`` below 50 and ``BottleneckBlock`` above by default.
            kwargs: further arguments for ``make_stage``, without strides and channels.
        """
        shallow = depth < 50
        if block_class is None:
            block_class = BasicBlock if shallow else BottleneckBlock
        outs = [64, 128, 256, 512] if shallow else [256, 512, 1024, 2048]
        ins = [64, *outs[:-1]]
        stages = []
        for blocks, stride, in_channels, out_channels in zip(_BLOCKS[depth], (1, 2, 2, 2), ins, outs, strict=True):
            own = {} if shallow else {"bottleneck_channels": out_channels // 4}
            stages.append(
                ResNet.make_stage(
                    block_class,
                    blocks,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    stride_per_block=[stride] + [1] * (blocks - 1),
                    **own,
                    **kwargs,
                )
            )
        return stages


def make_stage(*args: Any, **kwargs: Any) -> list[CNNBlockBase]:
    """Old name of ``ResNet.make_stage``."""
    return ResNet.make_stage(*args, **kwargs)


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet of ``cfg.MODEL.RESNETS``, frozen up to ``cfg.MODEL.BACKBONE.FREEZE_AT``."""
    node = cfg.MODEL.RESNETS
    depth, norm = node.DEPTH, node.NORM
    assert not any(node.DEFORM_ON_PER_STAGE), (
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE: deformable blocks are not provided by the embedded runtime; "
        "install Detectron2"
    )
    assert node.RES5_DILATION in (1, 2), f"MODEL.RESNETS.RES5_DILATION cannot be {node.RES5_DILATION}, only 1 or 2."
    stem = BasicStem(in_channels=input_shape.channels or 3, out_channels=node.STEM_OUT_CHANNELS, norm=norm)
    shallow = depth < 50
    if shallow:
        assert node.RES2_OUT_CHANNELS == 64, "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64 for R18/R34"
        assert node.RES5_DILATION == 1, "Must set MODEL.RESNETS.RES5_DILATION = 1 for R18/R34"
        assert node.NUM_GROUPS == 1, "Must set MODEL.RESNETS.NUM_GROUPS = 1 for R18/R34"
    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    bottleneck = node.NUM_GROUPS * node.WIDTH_PER_GROUP
    stages = []
    for number, blocks in enumerate(_BLOCKS[depth], start=2):
        dilation = node.RES5_DILATION if number == 5 else 1
        # A dilated res5 keeps the resolution of res4.
        stride = 1 if number == 2 or dilation == 2 else 2
        own = (
            {}
            if shallow
            else {
                "bottleneck_channels": bottleneck,
                "stride_in_1x1": node.STRIDE_IN_1X1,
                "dilation": dilation,
                "num_groups": node.NUM_GROUPS,
            }
        )
        stages.append(
            ResNet.make_stage(
                BasicBlock if shallow else BottleneckBlock,
                blocks,
                in_channels=in_channels,
                out_channels=out_channels,
                stride_per_block=[stride] + [1] * (blocks - 1),
                norm=norm,
                **own,
            )
        )
        in_channels, out_channels, bottleneck = out_channels, out_channels * 2, bottleneck * 2
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
