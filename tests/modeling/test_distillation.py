"""Distillation terms against loops in float64, and the distilled segmentor."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import approx, assert_close

from the_mask.config import load_config
from the_mask.config.compose import config_root
from the_mask.data.clips import Clip
from the_mask.engine.validate import validate
from the_mask.modeling.pixel.distillation import (
    content_mask,
    missing_teacher,
    pair_distillation,
    pixel_distillation,
    region_affinity,
)
from the_mask.modeling.pixel.distilled import DistilledSegmentor
from the_mask.weights.reading import locate_weights

CLASSES = 5


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_term_is_the_formula():
    student, teacher = maps(2, 3, 4, 5), 3 * maps(2, 3, 4, 5, seed=1)
    valid = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    tau, total, count = 2.5, 0.0, 0
    for b, y, x in valid.nonzero().tolist():
        t, s = teacher[b, :, y, x].double() / tau, student[b, :, y, x].double() / tau
        t = t.exp() / t.exp().sum()
        total += float(-(t * (s - s.exp().sum().log())).sum())
        count += 1
    got = pixel_distillation(student, teacher, tau, valid)
    assert got.item() == approx(tau**2 * total / count, "formula")
    assert pixel_distillation(student, teacher, tau, valid & False).item() == 0


def test_pixel_term_pulls_the_student_and_leaves_the_teacher():
    student, teacher = maps(1, 3, 4, 4).requires_grad_(), maps(1, 3, 8, 8, seed=1).requires_grad_()
    pixel_distillation(student, teacher).backward()
    assert teacher.grad is None
    small = torch.nn.functional.interpolate(teacher.detach(), size=(4, 4), mode="bilinear")
    expected = (student.detach().softmax(1) - small.softmax(1)) / 16
    torch.testing.assert_close(student.grad, expected)
    with pytest.raises(ValueError, match="equal B and K"):
        pixel_distillation(student, maps(1, 4, 8, 8))


def test_pair_term_is_the_formula():
    student, teacher = maps(2, 6, 5, 8), maps(2, 9, 5, 8, seed=1)

    def affinity(features):
        regions = {}
        for i, (rows, columns) in enumerate((r, c) for r in ((0, 2), (2, 4), (4, 5)) for c in ((0, 4), (4, 8))):
            part = features[:, rows[0] : rows[1], columns[0] : columns[1]].double()
            regions[i] = part.amax(dim=(1, 2))
        return [float(a @ b / (a.norm() * b.norm())) for b in regions.values() for a in regions.values()]

    total = 0.0
    for b in range(2):
        pairs = zip(affinity(student[b]), affinity(teacher[b]), strict=True)
        total += sum((s - t) ** 2 for s, t in pairs)
    assert pair_distillation(student, teacher, 0.5).item() == approx(total / (2 * 36), "formula")
    assert region_affinity(maps(1, 6, 4, 8), 0.5).shape == (1, 4, 4)
    assert region_affinity(maps(1, 6, 4, 8), 1.0).shape == (1, 1, 1)


def test_length_of_a_region_is_a_constant_to_the_gradient():
    student = maps(1, 4, 2, 2).requires_grad_()
    pair_distillation(student, maps(1, 4, 2, 2, seed=1)).backward()
    flat = student.detach().flatten(2)
    # Were the length differentiated, a gradient along the feature itself would vanish.
    along = (student.grad.flatten(2) * flat).sum(1)
    assert along.abs().max() > 1e-3


def test_content_mask_keeps_cells_whose_centre_is_in_the_picture():
    mask = content_mask([(8, 8), (5, 6)], (8, 8), (4, 4), "cpu")
    assert mask[0].all()
    assert mask[1].sum(1).tolist() == [3, 3, 0, 0]
    assert not mask[1, 2].any()  # its centre, 5, is not below 5


def options(*extra):
    base = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "ClipSegmentor",
        "MODEL.SEM_SEG_HEAD.NAME": "FCNHead",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
        "MODEL.SEM_SEG_HEAD.NUM_CONVS": 1,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.SEM_SEG_HEAD.NORM": "BN",
    }
    return [str(x) for pair in base.items() for x in pair] + [str(x) for x in extra]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A teacher twice as wide, as YAML and weights."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = load_config(overrides=options("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32))
    (folder / "teacher.yaml").write_text(cfg.dump())
    torch.manual_seed(5)
    torch.save(build_model(cfg).state_dict(), folder / "teacher.pth")
    return folder


def distilled(folder: Path, *extra):
    pairs = ["MODEL.META_ARCHITECTURE", "DistilledSegmentor"]
    pairs += ["MODEL.DISTILLATION.TEACHER_CONFIG", folder / "teacher.yaml"]
    pairs += ["MODEL.DISTILLATION.TEACHER_WEIGHTS", folder / "teacher.pth"]
    return load_config(overrides=options(*pairs, *extra))


def clips(height=64, width=64):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (2, height, width), generator=generator)
    return [
        Clip([f], [x], seed=i, video_id=str(i), padding=(height - 16 * i, width))
        for i, (f, x) in enumerate(zip(frames, labels, strict=True))
    ]


def test_distilled_segmentor_is_its_student_to_the_outside(teacher_file):
    cfg = distilled(teacher_file)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert isinstance(model, DistilledSegmentor)
    plain_cfg = cfg.clone()
    plain_cfg.MODEL.META_ARCHITECTURE = "ClipSegmentor"
    plain = build_model(plain_cfg)
    assert list(model.state_dict()) == list(plain.state_dict())
    random_state = torch.get_rng_state()
    losses = model(clips())
    # Dropout of the student draws random numbers; that the teacher was built in the first call changed none of them.
    torch.set_rng_state(random_state)
    assert_close(model(clips()), losses, "same")
    assert set(losses) == {"loss_ce", "loss_distill_pixel", "loss_distill_pair"}
    assert all(math.isfinite(value.item()) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert not model.teacher.training
    model.train()
    assert not model.teacher.training

    plain.load_state_dict(model.state_dict())
    plain.eval()
    model.eval()
    assert torch.equal(model.predict(clips())[0][0], plain.predict(clips())[0][0])
    scores, state = model.step(clips()[0].frames[0], model.init_state())
    assert torch.equal(scores, plain.step(clips()[0].frames[0], plain.init_state())[0])
    assert state["seen"] == 1
    model.load_state_dict(plain.state_dict())


def test_terms_are_those_of_both_models_outputs(teacher_file):
    model = build_model(distilled(teacher_file, "MODEL.DISTILLATION.TEMPERATURE", 2.0)).eval()
    losses = model.losses(clips())
    batch = model.student.training_batch(clips())
    features, output = model.student.clip_output(batch)
    lessons, answer = model.teacher.clip_output(batch)
    cells = output.logits.shape[-1]
    valid = torch.ones(2, cells, cells, dtype=torch.bool)
    valid[1, cells * 48 // 64 :] = False
    torch.testing.assert_close(
        losses["loss_distill_pixel"], 10 * pixel_distillation(output.logits, answer.logits, 2.0, valid)
    )
    torch.testing.assert_close(losses["loss_distill_pair"], 0.5 * pair_distillation(features["res5"], lessons["res5"]))
    only = build_model(distilled(teacher_file, "MODEL.DISTILLATION.PAIR_WEIGHT", 0.0)).eval()
    assert set(only.losses(clips())) == {"loss_ce", "loss_distill_pixel"}


def test_a_mask_classifier_teaches_by_the_shares_of_its_scores(tmp_path):
    debug = Path(__file__).parents[2] / "configs/debug/mask2former_debug.yaml"
    cfg = load_config(debug, ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(CLASSES)])
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.manual_seed(5)
    torch.save(build_model(cfg).state_dict(), tmp_path / "teacher.pth")
    pairs = ("MODEL.DISTILLATION.PAIR_WEIGHT", 0.0, "MODEL.CLIP_SEGMENTOR.SIZE_DIVISIBILITY", 32)
    model = build_model(distilled(tmp_path, *pairs)).eval()
    (one, other) = [Clip(clip.frames, clip.labels, seed=1) for clip in clips()]
    losses = model.losses([one, other])
    assert set(losses) == {"loss_ce", "loss_distill_pixel"}
    logits = model.student.clip_output(model.student.training_batch([one, other]))[1].logits.double()
    scores = torch.stack([scores[0] for scores in model.teacher.score_maps([one, other])]).double()
    shares = torch.nn.functional.interpolate(
        (scores / scores.sum(1, keepdim=True)).log(), logits.shape[-2:], mode="bilinear", align_corners=False
    ).softmax(1)
    expected = -10 * (shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["loss_distill_pixel"].double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"builds a MaskClassifier: .*PAIR_WEIGHT 0"):
        build_model(distilled(tmp_path)).losses([one, other])


def test_teacher_moves_with_the_model(teacher_file):
    model = build_model(distilled(teacher_file))
    assert next(model.teacher.parameters()).dtype == torch.float32
    model.double()
    assert next(model.teacher.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", ["street_live_distilled", "kd_r18", "kd_r18_cpu"])
def test_teachers_of_the_library_are_found_anywhere(name, tmp_path, monkeypatch):
    """By the name of a model, of a file, or of a row of a table; the shipped teacher's weights come along."""
    monkeypatch.chdir(tmp_path)
    options = load_config(f"camvid/{name}").MODEL.DISTILLATION
    assert list(missing_teacher(options)) == []
    load_config(options.TEACHER_CONFIG)
    if name == "street_live_distilled":
        assert locate_weights(options.TEACHER_WEIGHTS).is_file()


def test_bad_distillations_are_named(teacher_file, tmp_path):
    cfg = distilled(teacher_file, "MODEL.DISTILLATION.TEACHER_WEIGHTS", "")
    build_model(cfg).eval().predict(clips())  # the student runs without a teacher
    with pytest.raises(ValueError, match="TEACHER_WEIGHTS is empty"):
        build_model(cfg).losses(clips())
    config = tmp_path / "teacher.yaml"
    problem = f"config file {config} does not exist (configs are in {config_root()})"
    missing = list(missing_teacher(distilled(tmp_path).MODEL.DISTILLATION))
    assert missing == [f"MODEL.DISTILLATION.TEACHER_CONFIG: {problem}"]
    with pytest.raises(ValueError, match=rf"TEACHER_WEIGHTS: weights file {tmp_path / 'teacher.pth'} does not exist"):
        validate(distilled(tmp_path))
    with pytest.raises(ValueError, match=r"PAIR_LEVEL 'res9': the student has"):
        build_model(distilled(teacher_file, "MODEL.DISTILLATION.PAIR_LEVEL", "res9")).losses(clips())
    with pytest.raises(ValueError, match=r"5 classes .* the student 7"):
        build_model(distilled(teacher_file, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)).losses(clips())
    with pytest.raises(ValueError, match="STUDENT_ARCHITECTURE 'MaskClassifier'"):
        build_model(distilled(teacher_file, "MODEL.DISTILLATION.STUDENT_ARCHITECTURE", "MaskClassifier"))
    with pytest.raises(ValueError, match=r"TEACHER_CONFIG: .* does not exist"):
        validate(distilled(tmp_path))
    for key, value in (("PIXEL_WEIGHT", -1.0), ("TEMPERATURE", 0.0), ("PAIR_SCALE", 1.5)):
        with pytest.raises(ValueError, match=key):
            build_model(distilled(teacher_file, f"MODEL.DISTILLATION.{key}", value))
