"""Keys of the backbones."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Weights and feature maps with channels last in memory: changes results by rounding only. Faster with SOLVER.AMP on
    # a CPU with AMX.
    cfg.MODEL.CHANNELS_LAST = False

    # build_mit_backbone: SegFormer's encoder, "B0" ... "B5".
    cfg.MODEL.MIT = CfgNode()
    cfg.MODEL.MIT.VARIANT = "B0"
    # Stochastic depth of the last block; it rises linearly from 0.
    cfg.MODEL.MIT.DROP_PATH = 0.1
    # Recompute activations of each block in the backward pass to save memory.
    cfg.MODEL.MIT.CHECKPOINT = False

    # build_internimage_backbone: "T", "S", "B", "L", "XL", "H" or "G".
    cfg.MODEL.INTERNIMAGE = CfgNode()
    cfg.MODEL.INTERNIMAGE.VARIANT = "T"
    # Stochastic depth of the last block; None takes the variant's published segmentation value.
    cfg.MODEL.INTERNIMAGE.DROP_PATH = None
    # Initial value of the layer scales of the variants that have them (1.0 for segmentation, 1e-5 for ImageNet).
    cfg.MODEL.INTERNIMAGE.LAYER_SCALE = 1.0
    cfg.MODEL.INTERNIMAGE.CHECKPOINT = False
    # Smaller relatives of a variant, for tests: width of the first level (0: the variant's) and blocks per level.
    cfg.MODEL.INTERNIMAGE.CHANNELS = 0
    cfg.MODEL.INTERNIMAGE.DEPTHS = []

    # build_timm_backbone: any hierarchical model of timm that has strides 4, 8, 16 and 32.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "swin_tiny_patch4_window7_224"
    # Download timm's weights (needs the network). WEIGHTS, a local file in any layout timm reads, wins over it.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Feature levels (timm's numbering) that become res2..res5; [] finds strides 4, 8, 16, 32.
    cfg.MODEL.TIMM.OUT_INDICES = []
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # "LN" adds a LayerNorm to every output, as Mask2Former and UperNet do on Swin and ConvNeXt; "" does not.
    cfg.MODEL.TIMM.OUT_NORM = ""
    # Batch norms of the model: "" leaves them, "FrozenBN" freezes, "SyncBN" synchronises them.
    cfg.MODEL.TIMM.NORM = ""
    cfg.MODEL.TIMM.CHECKPOINT = False

    # build_swiftnet_r18_backbone: hand out each stage's sum before its ReLU instead of after it. The released SwiftNet
    # uses the maps after the ReLU; weights trained here before that was the default need True.
    cfg.MODEL.SWIFTNET = CfgNode()
    cfg.MODEL.SWIFTNET.PRE_RELU = False

    # build_beit_backbone: a timm BEiT with a four-level pyramid made from the outputs of OUT_INDICES' blocks.
    cfg.MODEL.BEIT = CfgNode()
    cfg.MODEL.BEIT.NAME = "beit_large_patch16_224"
    # Side (pixels) of the square that the position tables are for; windows of this size are exact.
    cfg.MODEL.BEIT.IMG_SIZE = 512
    # As MODEL.TIMM's; position tables of another size are resized.
    cfg.MODEL.BEIT.PRETRAINED = False
    cfg.MODEL.BEIT.WEIGHTS = ""
    cfg.MODEL.BEIT.OUT_INDICES = [7, 11, 15, 23]
    cfg.MODEL.BEIT.DROP_PATH = 0.2
    # Norm of the pyramid.
    cfg.MODEL.BEIT.NORM = "SyncBN"
    cfg.MODEL.BEIT.CHECKPOINT = False

    # build_vit_backbone: a plain vision transformer of timm (DINOv2, DINOv3, ViT), for EncoderSegmentor.
    cfg.MODEL.VIT = CfgNode()
    cfg.MODEL.VIT.NAME = "vit_small_patch14_reg4_dinov2"
    # Side (pixels) of the square that the position table is for; images of other sizes resample it.
    cfg.MODEL.VIT.IMG_SIZE = 512
    # Side (pixels) of a patch; 0 keeps the model's, another one resamples its kernel.
    cfg.MODEL.VIT.PATCH_SIZE = 16
    # As MODEL.TIMM's; kernel and position table of another size are resampled.
    cfg.MODEL.VIT.PRETRAINED = False
    cfg.MODEL.VIT.WEIGHTS = ""
    cfg.MODEL.VIT.DROP_PATH = 0.0
    # Smaller relatives of a model, for tests and small machines; 0 keeps the model's.
    cfg.MODEL.VIT.WIDTH = 0
    cfg.MODEL.VIT.DEPTH = 0
    cfg.MODEL.VIT.HEADS = 0
    cfg.MODEL.VIT.CHECKPOINT = False
