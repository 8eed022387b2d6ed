"""Every config in configs/ is loaded, built and trained for one step on random clips, at reduced size."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.engine.model_stats import model_configs
from the_mask.modeling.backbones.internimage import VARIANTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Files that start with an underscore are bases of others; those in backbones/ are fragments.
FRAGMENTS = CONFIGS / "backbones"
FILES = model_configs(CONFIGS)


def own_bases(path):
    """Bases that a config names itself."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    return [bases] if isinstance(bases, str) else bases


def read_bases(path):
    """Names of the bases of a config, joined."""
    return " ".join(name + " " + read_bases(path.parent / name) for name in own_bases(path))


# What is repeated is made few (queries, points, layers); the kinds of parts and the clip length stay.
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 15),
    *("MODEL.MASK_FORMER.DEC_LAYERS", 4),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1),
    # A batch of two 64x64 frames leaves few values per channel at stride 32, too few for batch statistics.
    *("MODEL.RESNETS.NORM", "FrozenBN"),
]


def small_backbone(cfg):
    if cfg.MODEL.BACKBONE.NAME == "build_internimage_backbone":
        cfg.MODEL.INTERNIMAGE.CHANNELS = VARIANTS[cfg.MODEL.INTERNIMAGE.VARIANT].group_channels
        cfg.MODEL.INTERNIMAGE.DEPTHS = [1, 1, 6, 1]
    elif cfg.MODEL.BACKBONE.NAME == "build_resnet_d8_backbone":
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    elif cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        family = cfg.MODEL.TIMM.NAME.split("_")[0]
        small = {"swin": "swin_tiny_patch4_window7_224", "convnext": "convnext_atto", "tf": "tf_efficientnet_lite0"}
        # Weights from a package would be those of the large model, and the package is optional.
        cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS = small[family], ""
    elif cfg.MODEL.BACKBONE.NAME == "build_vit_backbone":
        cfg.MODEL.VIT.WIDTH, cfg.MODEL.VIT.HEADS, cfg.MODEL.VIT.IMG_SIZE = 48, 3, 64
        cfg.MODEL.VIT.DEPTH = cfg.MODEL.ENCODER.NUM_BLOCKS + 1
        cfg.MODEL.ENCODER.FROZEN.LEVELS, cfg.MODEL.ENCODER.FROZEN.HEADS = [0, 2], 4
    elif cfg.MODEL.BACKBONE.NAME == "build_beit_backbone":
        cfg.MODEL.BEIT.NAME, cfg.MODEL.BEIT.IMG_SIZE = "beit_base_patch16_224", 64
        cfg.MODEL.BEIT.OUT_INDICES = [0, 1, 2, 3]  # later blocks are not kept


def small_heads(cfg):
    if cfg.MODEL.META_ARCHITECTURE not in ("ClipSegmentor", "DistilledSegmentor"):
        return
    for options in [*cfg.MODEL.BLOCKS.values(), cfg.MODEL.CLIP_SEGMENTOR, cfg.MODEL.SEM_SEG_HEAD]:
        for key in options:
            if key.endswith("CHANNELS") or key == "CONVS_DIM":
                options[key] = min(options[key], 32)


def small_teacher(cfg, folder):
    """A distillation's teacher of random weights, as small as its student."""
    options = cfg.MODEL.DISTILLATION
    teacher = load_config(CONFIGS.parent / options.TEACHER_CONFIG, SMALL)
    small_backbone(teacher)
    small_heads(teacher)
    teacher.MODEL.RESNETS.DEPTH = 18
    options.TEACHER_CONFIG, options.TEACHER_WEIGHTS = str(folder / "teacher.yaml"), str(folder / "teacher.pth")
    Path(options.TEACHER_CONFIG).write_text(teacher.dump())
    torch.save(build_model_on(teacher, "cpu").state_dict(), options.TEACHER_WEIGHTS)


def random_clips(cfg, num_clips=2, size=64):
    generator = torch.Generator().manual_seed(0)
    num_frames = len({0, *cfg.INPUT.CLIP.DILATIONS})
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    clips = []
    for number in range(num_clips):
        frames = [
            torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8) for _ in range(num_frames)
        ]
        labels = torch.full((size, size), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
        labels[:, : size // 2] = int(torch.randint(classes, (1,), generator=generator))
        labels[: size // 2, size // 2 :] = int(torch.randint(classes, (1,), generator=generator))
        clips.append({"frames": frames, "labels": [labels] * num_frames, "seed": number, "video_id": str(number)})
    return clips


def identifier(path):
    return str(path.relative_to(CONFIGS).with_suffix(""))


MODELS_DONE = set()


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_config_builds_and_steps(path, tmp_path):
    cfg = load_config(path)
    kind = (cfg.MODEL.dump(), cfg.INPUT.CLIP.dump())
    if kind in MODELS_DONE:
        return  # another file differs in how it trains or tests only
    cfg.MODEL.TIMM.WEIGHTS = ""  # of an optional package
    with torch.device("meta"):
        build_model_on(cfg, "meta")  # at full size
    cfg = load_config(path, SMALL)
    small_backbone(cfg)
    small_heads(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "DistilledSegmentor":
        small_teacher(cfg, tmp_path)
    torch.manual_seed(0)
    model = build_model_on(cfg, "cpu").train()
    losses = model(random_clips(cfg))
    total = sum(losses.values())
    assert torch.isfinite(total)
    assert total > 0
    total.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == reached
    with torch.no_grad():
        predictions = model.eval().predict([random_clips(cfg, 1)[0]])
    assert [tuple(labels.shape) for labels in predictions[0]] == [(64, 64)] * len(predictions[0])
    MODELS_DONE.add(kind)


@pytest.mark.parametrize("path", [path for path in FILES if "context" in read_bases(path)], ids=identifier)
def test_context_models_stream_as_they_train(path):
    """One backbone pass per frame gives what the clip that ends at the frame gives."""
    cfg = load_config(path, SMALL)
    small_backbone(cfg)
    small_heads(cfg)
    torch.manual_seed(0)
    model = build_model_on(cfg, "cpu").eval()
    model = getattr(model, "student", model)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or "expand" in name:
            torch.nn.init.constant_(parameter, 0.1)  # contexts that start at zero count too
    length = model.memory_length
    (clip,) = random_clips(cfg, 1)
    frames = (clip["frames"] * 3)[: length + 3]
    state, streamed = model.init_state(), []
    for frame in frames:
        scores, state = model.step(frame, state)
        streamed.append(scores)
    assert len(state["memory"]["frames"]) == length
    with torch.no_grad():
        for t in range(length, len(frames)):
            window = {"frames": frames[t - length : t + 1], "labels": [clip["labels"][0]] * (length + 1)}
            _, output = model.clip_output(model.training_batch([window]))
            torch.testing.assert_close(output.logits.softmax(dim=1)[0], streamed[t], rtol=1e-4, atol=1e-5)


def build_model_on(cfg, device):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


def test_every_base_is_used():
    used = {Path(name).name for path in CONFIGS.rglob("*.yaml") for name in own_bases(path)}
    assert {path.name for path in CONFIGS.rglob("_*.yaml")} <= used


@pytest.mark.parametrize("fragment", sorted(FRAGMENTS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["debug/mask2former_debug", "debug/swiftnet_debug", "debug/gsvnet_debug"])
def test_backbone_fragments_fit_every_family(base, fragment, tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(f'_BASE_: ["{CONFIGS / base}.yaml", "{fragment}"]\n')
    cfg = load_config(path, ["MODEL.TIMM.WEIGHTS", ""])
    assert cfg.MODEL.PIXEL_MEAN == [127.0] * 3
    with torch.device("meta"):
        model = build_model_on(cfg, "meta")
    backbone = getattr(model, "segmentor", model).backbone
    assert type(backbone).__name__ == "TimmBackbone"
    assert backbone.output_shape()["res5"].stride == 32
