"""Keys of the backbones."""

from __future__ import annotations

from the_mask.config.options import Options


class MitOptions(Options, group="MODEL.MIT"):
    """build_mit_backbone: SegFormer's encoder, "B0" ... "B5"."""

    variant: str = "B0"
    # Stochastic depth of the last block; it rises linearly from 0.
    drop_path: float = 0.1
    # Recompute activations of each block in the backward pass to save memory.
    checkpoint: bool = False


class InternImageOptions(Options, group="MODEL.INTERNIMAGE"):
    """build_internimage_backbone: "T", "S", "B", "L", "XL", "H" or "G"."""

    variant: str = "T"
    # Stochastic depth of the last block; None takes the variant's published segmentation value.
    drop_path: float | None = None
    # Initial value of the layer scales of the variants that have them (1.0 for segmentation, 1e-5 for ImageNet).
    layer_scale: float = 1.0
    checkpoint: bool = False
    # Smaller relatives of a variant, for tests: width of the first level (0: the variant's) and blocks per level.
    channels: int = 0
    depths: tuple[int, ...] = ()


class TimmOptions(Options, group="MODEL.TIMM"):
    """build_timm_backbone: any hierarchical model of timm that has strides 4, 8, 16 and 32."""

    name: str = "swin_tiny_patch4_window7_224"
    # Download timm's weights (needs the network). WEIGHTS, a local file in any layout timm reads, overrides it.
    pretrained: bool = False
    weights: str = ""
    # Feature levels (timm's numbering) that become res2..res5; [] finds strides 4, 8, 16, 32.
    out_indices: tuple[int, ...] = ()
    drop_path: float = 0.0
    # "LN" adds a LayerNorm to every output, as Mask2Former and UperNet do on Swin and ConvNeXt; "" does not.
    out_norm: str = ""
    # Batch norms of the model: "" leaves them, "FrozenBN" freezes, "SyncBN" synchronises them.
    norm: str = ""
    checkpoint: bool = False


class SwiftNetOptions(Options, group="MODEL.SWIFTNET"):
    """build_swiftnet_r18_backbone."""

    # Hand out each stage's sum before its ReLU instead of after it. The released SwiftNet uses the maps after the ReLU;
    # weights trained here before that was the default need True.
    pre_relu: bool = False


class BeitOptions(Options, group="MODEL.BEIT"):
    """build_beit_backbone: a timm BEiT with a four-level pyramid made from the outputs of OUT_INDICES' blocks."""

    name: str = "beit_large_patch16_224"
    # Side (pixels) of the square that the position tables are for; windows of this size are exact.
    img_size: int = 512
    # As MODEL.TIMM's; position tables of another size are resized.
    pretrained: bool = False
    weights: str = ""
    out_indices: tuple[int, ...] = (7, 11, 15, 23)
    drop_path: float = 0.2
    # Norm of the pyramid.
    norm: str = "SyncBN"
    checkpoint: bool = False


class VitOptions(Options, group="MODEL.VIT"):
    """build_vit_backbone: a plain vision transformer of timm (DINOv2, DINOv3, ViT), for EncoderSegmentor."""

    name: str = "vit_small_patch14_reg4_dinov2"
    # Side (pixels) of the square that the position table is for; images of other sizes resample it.
    img_size: int = 512
    # Side (pixels) of a patch; 0 keeps the model's, another one resamples its kernel.
    patch_size: int = 16
    # As MODEL.TIMM's; kernel and position table of another size are resampled.
    pretrained: bool = False
    weights: str = ""
    drop_path: float = 0.0
    # Smaller relatives of a model, for tests and small machines; 0 keeps the model's.
    width: int = 0
    depth: int = 0
    heads: int = 0
    checkpoint: bool = False
