"""Converts state dicts of other programs, recognised by their names, to this project's names.

A file is split into sections (backbone, head, auxiliary head) by the prefixes of its program. Each section goes to the
converter (:class:`Part`) that recognises its names. Our own names are kept, so converting twice changes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate
from torch import Tensor

from the_mask.weights.converters import (
    beit,
    convnext,
    encoder_only,
    huggingface,
    internimage,
    mask2former,
    resnet,
    segformer,
    swin,
    upernet,
)
from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import absent, apply_rules

BACKBONES: tuple[Part, ...] = (
    *encoder_only.VIT,
    *swin.PARTS,
    *convnext.PARTS,
    *beit.PARTS,
    *segformer.PARTS,
    *internimage.PARTS,
    *resnet.PARTS,
)
HEADS: tuple[Part, ...] = (*huggingface.PARTS, *mask2former.PARTS, *encoder_only.HEAD, *upernet.HEADS)
AUXILIARY: tuple[Part, ...] = upernet.AUXILIARY
_ALL = (*BACKBONES, *HEADS, *encoder_only.RELEASED_HEAD, *encoder_only.HUGGINGFACE)
FAMILIES = tuple(sorted({part.family for part in _ALL}))
# Families with files in the layout of another family: the one-frame stage of THE-Mask is a Mask2Former.
SAME_LAYOUT = {"the-mask": ("mask2former",)}


class UnknownLayoutError(ValueError):
    """No name in a file is known."""


@dataclass(frozen=True)
class Section:
    """A group of tensors with the same prefix.

    Attributes:
        prefix: prefix of their names, which is removed.
        parts: the converters that may apply; empty: the section is left out.
        home: prefix of the converted names.
        reason: why a section without converters is left out.
        native: whether the prefix is ours, so that unknown names below it are kept.
    """

    prefix: str
    parts: tuple[Part, ...]
    home: str
    reason: str = ""
    native: bool = False


_NO_HEAD = "this project has no such head"
DIFFERENCES = (
    "holds what training added to an encoder (a released model on DINOv3), not its weights: convert it with the "
    "original weights first, the-mask convert IN OUT --base DINOV3"
)
_FROM_CONFIG = "a constant that the config gives"
# Programs, recognised by prefixes that must occur. The first match is taken; longer prefixes come before shorter ones.
LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[Section, ...]], ...] = (
    (
        "Hugging Face Mask2Former",
        ("model.pixel_level_module.",),
        (
            Section("model.pixel_level_module.encoder.", BACKBONES, "backbone."),
            Section("criterion.", (), "criterion.", native=True),
            Section("", huggingface.PARTS, "sem_seg_head."),
        ),
    ),
    (
        "Hugging Face SegFormer",
        ("segformer.",),
        (
            Section("segformer.", BACKBONES, "backbone."),
            Section("decode_head.", (), "", _NO_HEAD),
            Section("classifier.", (), "", "classifier"),
        ),
    ),
    (
        "released EoMT",
        ("network.",),
        (
            Section("network.encoder.backbone.", BACKBONES, "backbone."),
            Section("network.encoder.", (), "", _FROM_CONFIG),
            Section("network.", encoder_only.RELEASED_HEAD, "sem_seg_head."),
            Section("criterion.", (), "", _FROM_CONFIG),
        ),
    ),
    (
        "released VidEoMT",
        ("backbone.encoder.backbone.",),
        (
            Section("backbone.encoder.backbone.", BACKBONES, "backbone."),
            Section("backbone.encoder.", (), "", _FROM_CONFIG),
            Section("backbone.", encoder_only.RELEASED_HEAD, "sem_seg_head."),
            Section("criterion.", (), "", _FROM_CONFIG),
            Section("pixel_", (), "", _FROM_CONFIG),
        ),
    ),
    (
        "Hugging Face EoMT",
        ("upscale_block.",),
        (Section("criterion.", (), "", _FROM_CONFIG), Section("", encoder_only.HUGGINGFACE, "")),
    ),
    (
        "OpenMMLab",
        ("decode_head.", "panoptic_head.", "auxiliary_head."),
        (
            Section("backbone.", BACKBONES, "backbone."),
            Section("neck.", (), ""),
            Section("decode_head.criterion.", (), "criterion.", native=True),
            Section("decode_head.", HEADS, "sem_seg_head.", _NO_HEAD),
            Section("panoptic_head.", HEADS, "sem_seg_head.", _NO_HEAD),
            Section("auxiliary_head.", AUXILIARY, "auxiliary_heads.", _NO_HEAD),
        ),
    ),
    (
        "Detectron2",
        ("sem_seg_head.", "backbone."),
        (
            Section("backbone.", BACKBONES, "backbone.", native=True),
            Section("sem_seg_head.", HEADS, "sem_seg_head.", native=True),
            Section("", (), "", native=True),
        ),
    ),
    ("a bare backbone", ("",), (Section("", BACKBONES, "backbone."),)),
)


@dataclass
class Conversion:
    """A converted state dict, and what was done with each tensor of the file.

    Attributes:
        state: tensors by our names.
        source: the file.
        layout: the program whose prefixes the names have.
        parts: titles of the converters that were used.
        families: their families.
        used: names of the file that are in ``state``.
        ignored: names of the file that are left out on purpose, and why.
        unknown: names of the file that no converter knows; they are left out.
        missing: our names that a complete model of this kind has, but the file does not.
        differences: whether the encoder's tensors are changes to weights that are not in the file.
        settings: config keys with which a model computes the same as the release of these weights.
    """

    state: dict[str, Tensor]
    source: str
    layout: str
    parts: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    differences: bool = False
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """One line that describes the file."""
        return f"{self.layout}: {', '.join(self.parts) or 'nothing known'}"

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        rows = [("used", len(self.used), "")]
        rows += [(f"ignored: {reason}", len(names), _some(names)) for reason, names in reasons.items()]
        rows += [("unknown, left out", len(self.unknown), _some(self.unknown))]
        rows += [("missing", len(self.missing), _some(self.missing, 12))]
        table = tabulate(rows, headers=("tensors", "number", "which"), maxcolwidths=[40, None, 80])
        advice = "".join(f"\nas its release computes: {key} {value}" for key, value in self.settings.items())
        return f"{self.source}\nread as {self.title}\n{table}{advice}"


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def convert(state: Mapping[str, Tensor], source: str = "the file", family: str = "") -> Conversion:
    """Convert a state dict.

    Args:
        state: tensors by the names of the file.
        source: for messages.
        family: one of :data:`FAMILIES`, to get an error if the file is of another one; "" accepts any.

    Returns:
        The conversion, which may be incomplete: see :func:`check`.

    Raises:
        UnknownLayoutError: no name in the file is known.
        ValueError: the file is of another family, or it mixes two layouts.
    """
    if family and family not in FAMILIES:
        close = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown format {family!r}: must be one of {', '.join(FAMILIES)}{hint}")
    layout, sections = next(
        (title, sections) for title, prefixes, sections in LAYOUTS if any(name.startswith(prefixes) for name in state)
    )
    result = Conversion({}, source, layout)
    if layout == "OpenMMLab":
        # The neck that makes BEiT's pyramid is part of the backbone here.
        state = {f"backbone.{name}" if name.startswith("neck.") else name: value for name, value in state.items()}
    rest = dict(state)
    for section in sections:
        local = {
            name.removeprefix(section.prefix): rest.pop(name) for name in list(rest) if name.startswith(section.prefix)
        }
        if local:
            _convert_section(section, local, result)
    result.unknown += rest
    result.differences = layout.startswith("released") and encoder_only.holds_differences(result.state)
    if not result.parts and not result.used:
        first = ", ".join(list(state)[:4])
        raise UnknownLayoutError(
            f"{source}: no known family of weights; its names start {first}. Known: {', '.join(FAMILIES)}"
        )
    if family and not {family, *SAME_LAYOUT.get(family, ())}.intersection(result.families):
        raise ValueError(f"{source} is not of family {family!r}; it looks like {result.title}")
    return result


def _convert_section(section: Section, local: Mapping[str, Tensor], result: Conversion) -> None:
    """Convert the tensors of one section into ``result``."""
    part = next((part for part in section.parts if part.recognises(local)), None)
    if part is None:
        names = [section.prefix + name for name in local]
        if section.native:
            result.state |= {section.home + name: value for name, value in local.items()}
            result.used += names
        elif section.reason:
            result.ignored |= dict.fromkeys(names, section.reason)
        else:
            result.unknown += names
        return
    mapped = apply_rules(part.rules, local, part.known)
    kept = mapped.unknown if section.native else []
    result.parts.append(part.title)
    result.families.append(part.family)
    result.settings |= dict(part.settings)
    result.used += [section.prefix + name for name in (*mapped.used, *kept)]
    result.ignored |= {section.prefix + name: reason for name, reason in mapped.ignored.items()}
    result.unknown += [] if section.native else [section.prefix + name for name in mapped.unknown]
    result.missing += [section.home + name for name in absent(part.names, mapped.state)]
    result.missing += [section.home + name for name in mapped.incomplete]
    result.state |= {section.home + name: value for name, value in mapped.state.items()}
    result.state |= {section.home + name: local[name] for name in kept}


def check(result: Conversion) -> Conversion:
    """Return the conversion if it is complete.

    Raises:
        ValueError: it is not; the message has the whole report.
    """
    if result.missing:
        raise ValueError(f"{result.source} lacks {len(result.missing)} tensors that it should have\n{result}")
    return result
