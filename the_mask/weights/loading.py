"""Loads weights into a model from any supported file, with a report.

Files are read by :mod:`the_mask.weights.reading`; names of other programs are translated by
:mod:`the_mask.weights.converters`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate
from torch import Tensor, nn

from the_mask.data.class_names import describe_difference, same_classes
from the_mask.modeling.mask.mask_decoders import stage1_to_stage2
from the_mask.modeling.propagation.official import bisenet_name, swiftnet_name
from the_mask.weights.class_sets import CLASS_COLUMNS, CLASS_LAYERS, ClassSets, matching_rows, transfer_rows
from the_mask.weights.converters import UnknownLayoutError, convert
from the_mask.weights.converters.convert import DIFFERENCES
from the_mask.weights.converters.tables import add_queries, fit_position_tables
from the_mask.weights.reading import read_weights
from the_mask.weights.sharding import load_whole

logger = logging.getLogger(__name__)

# What the config determines: constants of losses and filters, counters. A file without them lacks nothing.
DETERMINED = re.compile(r"(^|\.)(criterion\..*|filter_copy_s|num_batches_tracked)$")
# If a smaller share of the file's tensors fits, the file is for another architecture.
LEAST_MATCH = 0.5


@dataclass
class LoadReport:
    """What was done with each tensor of a weights file.

    Attributes:
        path: the file.
        loaded: names (of the model) that were filled.
        missing: names of the model that are not in the file.
        unexpected: names of the file (after renaming) that are not in the model.
        mismatched: (name, shape in the file, shape in the model) of tensors that could not be filled.
        dropped: like ``mismatched``, for class layers of a file made for other classes.
        by_name: class layers of such a file whose rows of same-named classes were copied.
        ignored: names of the file that a segmentor does not have, e.g. a classifier, and why.
        notes: how the file was read: renaming, averaged weights, stage-1 conversion.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dropped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    by_name: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def match(self) -> float:
        """Share of the file's tensors that fit (class layers are counted as fitting), 0..1."""
        found = len(self.loaded) + len(self.dropped) + len(self.by_name)
        total = found + len(self.unexpected) + len(self.mismatched)
        return found / total if total else 0.0

    @property
    def lacking(self) -> list[str]:
        """Names in :attr:`missing` whose values do not follow from the config."""
        return [name for name in self.missing if not DETERMINED.search(name)]

    def untrained(self) -> list[str]:
        """Names of the model that keep their random initialisation; what the config determines is not among them."""
        shapes = [name for name, _, _ in self.mismatched + self.dropped]
        return self.lacking + [name for name in shapes if not DETERMINED.search(name)]

    @property
    def fits(self) -> bool:
        """Whether file and model differ in their classes at most."""
        return not (self.lacking or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """One line if :attr:`fits`, else the whole table."""
        if not self.fits:
            return str(self)
        anew = [item for item in self.dropped if not DETERMINED.search(item[0])]
        found, total = len(self.loaded), len(self.loaded) + len(anew) + len(self.by_name)
        parts = [f"all {found} tensors loaded" if found == total else f"{found} of {total} tensors loaded"]
        parts += [f"class layers, started anew: {_shapes(anew, 2)}"] if anew else []
        parts += [f"class layers, rows copied by name: {_names(self.by_name)}"] if self.by_name else []
        parts += [f"{len(self.ignored)} of the file ignored"] if self.ignored else []
        return f"{self.path}: " + "; ".join([*parts, *self.notes])

    def __str__(self) -> str:
        rows = [
            ("loaded", len(self.loaded), ""),
            ("missing in the file", len(self.lacking), _names(self.lacking)),
            ("unknown to the model", len(self.unexpected), _names(self.unexpected)),
            ("other shape", len(self.mismatched), _shapes(self.mismatched)),
        ]
        determined = [name for name in self.missing if name not in self.lacking]
        if determined:
            rows.append(("set by the config", len(determined), _names(determined)))
        for reason in dict.fromkeys(self.ignored.values()):
            names = [name for name, why in self.ignored.items() if why == reason]
            rows.append((f"ignored: {reason}", len(names), _names(names)))
        if self.dropped:
            rows.append(("class layers, started anew", len(self.dropped), _shapes(self.dropped)))
        if self.by_name:
            rows.append(("class layers, rows copied by name", len(self.by_name), _names(self.by_name)))
        table = tabulate(rows, headers=("weights", "tensors", "which"), tablefmt="simple", maxcolwidths=[40, None, 90])
        return "\n".join([self.path, *self.notes, table])


def _names(names: list[str], limit: int = 6) -> str:
    """The first names; parameters of the same module are shown as one."""
    folded = list(dict.fromkeys(re.sub(r"\.(weight|bias|running_mean|running_var)$", ".*", name) for name in names))
    return ", ".join(folded[:limit]) + (f", ... ({len(folded) - limit} more)" if len(folded) > limit else "")


def _shapes(items: list[tuple[str, tuple[int, ...], tuple[int, ...]]], limit: int = 4) -> str:
    shown = [f"{name}: file {list(theirs)}, model {list(ours)}" for name, theirs, ours in items[:limit]]
    return "; ".join(shown) + (f"; ... ({len(items) - limit} more)" if len(items) > limit else "")


def load_weights(
    model: nn.Module,
    path: str | Path,
    trust_pickle: bool = False,
    stage1: bool = False,
    strict: bool = False,
    use_ema: bool = True,
    classes: ClassSets | None = None,
) -> LoadReport:
    """Fill a model from a file, and log what was loaded: one line if all of it fits, else a table.

    Args:
        model: changed in place, and only if no error is raised.
        path: ``.pth``, ``.safetensors`` or (with ``trust_pickle``) ``.pkl``.
        trust_pickle: allow formats that can execute code when opened.
        stage1: the file is a one-frame (stage 1) checkpoint for a temporal (stage 2) model: its norm and heads are
            copied to the clip and the frame branch.
        strict: every parameter of the model must be in the file, as needed for an evaluation. Otherwise, if the file
            has fewer queries, the model's other ones start as noisy copies of them.
        use_ema: take the averaged weights of a checkpoint that has both.
        classes: names of the model's classes and what to do if the file has others; None compares only the numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, untrusted, for another architecture (less than half of the file's tensors fit), or, with
            ``strict``, incomplete or with other classes. The message has the report.
    """
    file = read_weights(path, trust_pickle, use_ema)
    ours = model.state_dict()
    names = best_names(file.state, ours, str(path))
    notes = file.notes + names.notes
    state, resized = fit_position_tables(names.state, ours)
    if resized:
        notes.append(f"{len(resized)} position tables resized, e.g. {resized[0]}")
    if not strict:
        state, added = add_queries(state, ours)
        notes += [added] if added else []
    if stage1:
        state = stage1_to_stage2(state)
        notes.append("stage 1 to stage 2: norm and heads copied to the clip and the frame branch")
    report = compare(state, ours, str(path))
    report.unexpected += names.unknown
    report.ignored = names.ignored
    report.notes = notes
    if classes is not None:
        state = _apply_classes(state, ours, report, classes, file.class_names, strict)
    if report.match < LEAST_MATCH:
        raise ValueError(
            f"{path} looks like weights of another architecture: only {report.match:.0%} of its tensors fit\n{report}"
        )
    if strict and report.untrained():
        raise ValueError(f"{path} does not fill the whole model, so an evaluation would mean nothing\n{report}")
    load_whole(model, {name: state[name] for name in report.loaded + report.by_name}, strict=False)
    incomplete = report.lacking or report.unexpected or report.mismatched or report.dropped or report.by_name
    logger.log(logging.WARNING if incomplete else logging.INFO, "%s", report.summary())
    return report


def _apply_classes(
    state: dict[str, Tensor],
    ours: Mapping[str, Tensor],
    report: LoadReport,
    classes: ClassSets,
    stored: tuple[str, ...] | None,
    strict: bool,
) -> dict[str, Tensor]:
    """Drop the class layers of a file with other classes, or fill them by name. Changes the report.

    Returns:
        The file's tensors, with class layers that were filled by name replaced.
    """
    named = classes.file or (stored if classes.check or classes.by_name else None)
    theirs = named or (classes.assumed if classes.check else None)
    if theirs is None or classes.model is None:
        if classes.by_name:
            unknown = (
                f"{report.path} does not say which classes it has; name a data set in MODEL.WEIGHTS_CLASSES"
                if theirs is None
                else "the model's classes are unknown: no registered data set of DATASETS has as many"
            )
            raise ValueError(f"MODEL.INIT_CLASSES_BY_NAME: {unknown}")
        return state
    if same_classes(classes.model, theirs):
        return state
    difference = describe_difference(classes.model, theirs)
    if strict:
        whose = "" if named else " (it does not name its classes; those of DATASETS.TRAIN are taken)"
        raise ValueError(
            f"{report.path} was trained for other classes, so its results would mean nothing: {difference}{whose}. "
            "(MODEL.CHECK_CLASS_NAMES False compares only their number.)"
        )
    report.notes.append(f"the file has another class set: {difference}")
    # If only the number of rows is equal, rows of other classes would look trained.
    for name in [name for name in report.loaded if CLASS_LAYERS.search(name) and not name.endswith("empty_weight")]:
        report.loaded.remove(name)
        report.dropped.append((name, tuple(state[name].shape), tuple(ours[name].shape)))
    if not classes.by_name:
        return state
    filled = transfer_rows(state, ours, classes.model, theirs)
    report.dropped = [item for item in report.dropped if item[0] not in filled]
    report.by_name = list(filled)
    rows = matching_rows(classes.model, theirs)
    anew = [name for index, name in enumerate(classes.model) if index not in rows]
    report.notes.append(
        f"class rows: {len(rows)} of {len(classes.model)} copied by name, {len(anew)} started anew"
        + (f" ({', '.join(anew[:6])}{', ...' if len(anew) > 6 else ''})" if anew else "")
    )
    return {**state, **filled}


def compare(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: str = "") -> LoadReport:
    """Compare the tensors of a file with a model's state dict, by name and shape."""
    report = LoadReport(path)
    for name, value in ours.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape == value.shape:
            report.loaded.append(name)
        else:
            theirs, mine = tuple(state[name].shape), tuple(value.shape)
            axes = [axis for axis in range(len(mine)) if theirs[axis : axis + 1] != mine[axis : axis + 1]]
            axis = 1 if name.endswith(CLASS_COLUMNS) else 0
            classes_differ = CLASS_LAYERS.search(name) is not None and axes == [axis] and len(theirs) == len(mine)
            (report.dropped if classes_differ else report.mismatched).append((name, theirs, mine))
    report.unexpected = [name for name in state if name not in ours and not name.endswith("num_batches_tracked")]
    return report


# Renamings of all names of a file. The one that makes most names known is used, on ties the first.
RENAMINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("", lambda name: name),
    ("'backbone.' put before each", lambda name: f"backbone.{name}"),
    ("'backbone.model.' put before each (timm)", lambda name: f"backbone.model.{name}"),
    ("'model.' removed", lambda name: name.removeprefix("model.")),
    ("'backbone.bottom_up.' to 'backbone.'", lambda name: name.replace("backbone.bottom_up.", "backbone.", 1)),
    ("'segmentor.' removed (keyframes)", lambda name: name.removeprefix("segmentor.")),
    ("'segmentor.' put before each (keyframes)", lambda name: f"segmentor.{name}"),
    ("'propagator.' put before each (keyframes)", lambda name: f"propagator.{name}"),
    ("'backbone.context_path.' put before each", lambda name: f"backbone.context_path.{name}"),
    ("SwiftNet release", swiftnet_name),
    ("BiSeNet (TorchSeg) release", bisenet_name),
)


def best_renaming(state: Mapping[str, Tensor], ours: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """Rename a file's tensors by the entry of :data:`RENAMINGS` that makes most names known to the model."""
    known = set(ours)
    description, rename = max(RENAMINGS, key=lambda item: sum(item[1](name) in known for name in state))
    return {rename(name): value for name, value in state.items()}, description


@dataclass
class NamedState:
    """A file's tensors with the model's names.

    Attributes:
        state: tensors by name.
        notes: what was done.
        ignored, unknown: see :class:`the_mask.weights.converters.Conversion`.
    """

    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def best_names(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: str) -> NamedState:
    """Rename a file's tensors to the model's names, by a renaming or a converter, whichever fits more of them."""

    def fitting(candidate: Mapping[str, Tensor]) -> int:
        return sum(name in ours and ours[name].shape == value.shape for name, value in candidate.items())

    renamed, description = best_renaming(state, ours)
    plain = NamedState(renamed, [f"names: {description}"] if description else [])
    try:
        conversion = convert(state, path)
    except UnknownLayoutError:
        return plain
    if conversion.differences:
        raise ValueError(f"{path} {DIFFERENCES}")
    better = fitting(conversion.state) - fitting(renamed)
    if better < 0 or (better == 0 and not description):
        return plain
    notes = [f"read as {conversion.title}"]
    notes += [f"as its release computes: {key} {value}" for key, value in conversion.settings.items()]
    return NamedState(conversion.state, notes, conversion.ignored, conversion.unknown)
