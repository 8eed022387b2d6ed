"""From network size back to image size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def sem_seg_postprocess(result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int) -> Tensor:
    """Cut the padding off a score map and resize it bilinearly.

    Args:
        result: [K,H,W] scores of a padded image.
        img_size: (height, width) of the image without padding.
        output_height: rows of the result.
        output_width: columns of the result.

    Returns:
        [K,output_height,output_width].
    """
    height, width = img_size
    valid = result[None, :, :height, :width]
    return F.interpolate(valid, size=(output_height, output_width), mode="bilinear", align_corners=False)[0]
