"""Context block ``class_memory``: decoders A and B of "Memory Based Video Scene Parsing", and MCIBI."""

from __future__ import annotations

from torch import Tensor, nn

from the_mask.modeling.pixel.context.class_context import LOOKUPS, ClassContext
from the_mask.modeling.pixel.context.class_memory import INITS, RESOLUTIONS, ClassMemory
from the_mask.modeling.pixel.context.class_rows import MomentumSchedule
from the_mask.modeling.pixel.context.registry import BlockInputs, ContextBlock, block_type
from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap, TrainBatch

STAGE1 = "stage1"


class ClassMemoryBlock(ContextBlock):
    """Main level R [B, C, h, w] -> C_bi [B, C, h, w]; the network is ``class_context.ClassContext``.

    Its first classifier is supervised as ``loss_ce_stage1``; with a ``memory_weight`` the head's last classifier also
    has to tell the classes of the memory's rows, as ``loss_memory``.

    Args:
        context: the network.
        stage1_weight: weight of ``loss_ce_stage1``.
        memory_weight: weight of ``loss_memory``; 0 leaves it out.
        memory_start: first iteration of ``loss_memory``.
        suffix: suffix of the losses' names, to distinguish several such blocks.
    """

    uses_prior = True
    stateful = True

    def __init__(
        self,
        context: ClassContext,
        stage1_weight: float = 0.4,
        memory_weight: float = 0.0,
        memory_start: int = 0,
        suffix: str = "",
    ) -> None:
        super().__init__()
        if min(stage1_weight, memory_weight, memory_start) < 0:
            raise ValueError(
                f"class memory: STAGE1_WEIGHT {stage1_weight}, MEMORY_LOSS {memory_weight} and its start must be >= 0"
            )
        self.context = context
        self.stage1_weight = stage1_weight
        self.memory_weight = memory_weight
        self.memory_start = memory_start
        self.suffix = suffix
        self.out_channels = context.memory.rows.shape[2]
        self.classifier_channels = self.out_channels if memory_weight else 0

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        output = self.context(query[MAIN], prior)
        if not self.training:
            return BlockOutput(output.feature)
        name = STAGE1 + self.suffix
        return BlockOutput(output.feature, {name: output.stage1}, {name: self.stage1_weight})

    def extra_losses(self, classifier: nn.Module, iteration: int) -> dict[str, Tensor]:
        if not self.memory_weight or iteration < self.memory_start:
            return {}
        return {f"loss_memory{self.suffix}": self.memory_weight * self.context.memory_loss_of(classifier)}

    def after_loss(self, batch: TrainBatch, iteration: int) -> None:
        self.context.after_loss(batch, iteration)

    def after_step(self) -> None:
        self.context.after_step()


@block_type("class_memory")
def build_class_memory(inputs: BlockInputs) -> ClassMemoryBlock:
    """From ``MODEL.BLOCKS.CLASS_MEMORY``; C is the width of the main level."""
    options, cfg = inputs.options, inputs.cfg
    memory = ClassMemory(
        inputs.num_classes,
        inputs.channels(),
        options.PROTOTYPES,
        inputs.choice("INIT", INITS),
        options.INIT_FILE,
        inputs.choice("UPDATE_RES", RESOLUTIONS),
        MomentumSchedule(options.MOMENTUM, options.MOMENTUM_POWER, options.MOMENTUM_FLOOR),
    )
    context = ClassContext(
        inputs.channels(),
        memory,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        inputs.norm,
        cfg.MODEL.SEM_SEG_HEAD.DROPOUT,
        inputs.choice("LOOKUP", LOOKUPS),
        cfg.SOLVER.MAX_ITER,
    )
    start = round(options.MEMORY_LOSS_START * cfg.SOLVER.MAX_ITER)
    suffix = "" if inputs.name == "class_memory" else f"_{inputs.name}"
    return ClassMemoryBlock(context, options.STAGE1_WEIGHT, options.MEMORY_LOSS, start, suffix)
