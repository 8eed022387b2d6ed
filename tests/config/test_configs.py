"""Every config in configs/ is loaded, built and trained for one step on random clips, at reduced size."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close

import the_mask.modeling
import the_mask.weights  # noqa: F401  (reads the teachers)
from the_mask.config import ConfigFile, config_names, find_config, load_config
from the_mask.config.compose import TABLE, config_bases, config_root
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.clips import Clip
from the_mask.modeling.backbones.internimage import VARIANTS

CONFIGS = config_root()
NAMES = config_names()


def all_bases(config):
    """What a config is based on, directly or not."""
    found = config_bases(config)
    return found + [base for direct in found for base in all_bases(direct)]


# The study of attention on CamVid, and TMANet on Cityscapes.
CONTEXT = [name for name in NAMES if any(base.path.stem == "context" for base in all_bases(find_config(name)))]


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
    teacher = load_config(options.TEACHER_CONFIG, SMALL)
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
        clips.append(Clip(frames, [labels] * num_frames, seed=number, video_id=str(number)))
    return clips


MODELS_DONE = set()


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_steps(name, tmp_path):
    cfg = load_config(name)
    kind = (cfg.MODEL.dump(), cfg.INPUT.CLIP.dump())
    if kind in MODELS_DONE:
        return  # another file differs in how it trains or tests only
    cfg.MODEL.TIMM.WEIGHTS = ""  # of an optional package
    with torch.device("meta"):
        build_model_on(cfg, "meta")  # at full size
    cfg = load_config(name, SMALL)
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


@pytest.mark.parametrize("name", CONTEXT)
def test_context_models_stream_as_they_train(name):
    """One backbone pass per frame gives what the clip that ends at the frame gives."""
    cfg = load_config(name, SMALL)
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
    frames = (clip.frames * 3)[: length + 3]
    state, streamed = model.init_state(), []
    for frame in frames:
        scores, state = model.step(frame, state)
        streamed.append(scores)
    assert len(state["memory"]["frames"]) == length
    with torch.no_grad():
        for t in range(length, len(frames)):
            window = Clip(frames[t - length : t + 1], [clip.labels[0]] * (length + 1))
            _, output = model.clip_output(model.training_batch([window]))
            assert_close(output.logits.softmax(dim=1)[0], streamed[t], "network")


def build_model_on(cfg, device):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


def test_every_part_is_used():
    used = {str(base) for name in NAMES for base in (find_config(name), *all_bases(find_config(name)))}
    used = {str(Path(base).resolve()) for base in used}
    parts = [ConfigFile(path) for path in CONFIGS.rglob("*.yaml") if path.name != TABLE]
    parts += [ConfigFile(path, row) for path in CONFIGS.rglob(TABLE) for row in parse_yaml(path.read_bytes())]
    # A user's own choice: no model of the library is built on them.
    optional = {str(path.resolve()) for path in (CONFIGS / "backbones").glob("efficientnet_lite*.yaml")}
    optional.add(str((CONFIGS / "recipes" / "the_mask_as_released.yaml").resolve()))
    assert {str(Path(str(part)).resolve()) for part in parts} - used <= optional


def test_names_in_the_documentation_are_found():
    text = "".join(path.read_text() for path in (CONFIGS.parent / "docs").glob("*.md"))
    folders = "|".join(sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
    found = set(re.findall(rf"(?:configs/)?(?:{folders})/\w+(?:\.yaml)?(?![\w/*{{])", text))
    assert len(found) > 100
    missing = [name for name in sorted(found) if not _is_config(name)]
    assert missing == []


def _is_config(name):
    try:
        find_config(name)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.parametrize("fragment", sorted((CONFIGS / "backbones").glob("efficientnet*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("base", ["debug/mask2former_debug", "debug/swiftnet_debug", "debug/gsvnet_debug"])
def test_backbone_fragments_fit_every_family(base, fragment, tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(f'_BASE_: ["{CONFIGS / base}.yaml", "{fragment}"]\n')
    cfg = load_config(path, ["MODEL.TIMM.WEIGHTS", ""])
    assert cfg.MODEL.PIXEL_MEAN == [127.0] * 3
    with torch.device("meta"):
        model = build_model_on(cfg, "meta")
    backbone = getattr(model, "segmentor", model).backbone
    assert type(backbone).__name__ == "EfficientNetLite"
    assert backbone.output_shape()["res5"].stride == 32


@pytest.mark.parametrize("stage", ["1f", "video"])
def test_the_mask_as_released_changes_what_it_says(stage, tmp_path):
    """The fragment on both stages: every key of it arrives, nothing else moves, and the model builds."""
    fragment = CONFIGS / "recipes" / "the_mask_as_released.yaml"
    path = tmp_path / "released.yaml"
    base = CONFIGS / "debug" / f"the_mask_debug_{stage}.yaml"
    path.write_text(f'_BASE_: ["{base}", "{fragment}"]\n')
    cfg, plain = load_config(path, SMALL), load_config(base, SMALL)

    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    said = dict(leaves(parse_yaml(fragment.read_text())))
    found, before = dict(leaves(cfg)), dict(leaves(plain))
    assert {key: found[key] for key in said} == said
    changed = {key for key in found if found[key] != before[key]}
    assert changed <= set(said)
    assert {"MODEL.MASK_FORMER.VALID_MASK", "MODEL.THE_MASK.WARMUP_MODE", "MODEL.THE_MASK.FROZEN_EVAL"} <= changed
    build_model(cfg)
