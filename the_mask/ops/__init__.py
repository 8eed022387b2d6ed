"""Operators that run everywhere: ``ms_deform_attn`` and ``dcnv3`` with the layers built on them, ``upsample_argmax``.

Every operator has three implementations ("paths") with the same schema, see :mod:`the_mask.ops.selection`.
:func:`explain` tells which one is used and why; :func:`use` and the environment variable ``THE_MASK_OPS`` force one;
:func:`decomposed` replaces the deformable operators by standard PyTorch operators for exporters.
"""

from the_mask.ops.dcn.module import DCNv3
from the_mask.ops.dcn.op import dcnv3
from the_mask.ops.labels.op import upsample_argmax
from the_mask.ops.msda.module import MSDeformAttn
from the_mask.ops.msda.op import ms_deform_attn
from the_mask.ops.selection import decomposed, explain, use

__all__ = ["DCNv3", "MSDeformAttn", "dcnv3", "decomposed", "explain", "ms_deform_attn", "upsample_argmax", "use"]
