"""PropagatedSegmentor: streams, batches, states, queries, training; with a segmentor whose answers are known."""

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from tolerances import assert_close
from torch.nn import functional as F

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.config.keys.keyframe import KeyframeOptions
from the_mask.data.clips import Clip
from the_mask.modeling.propagation import CopyPropagator, GSVNet, WarpPropagator
from the_mask.modeling.propagation.carried import log_probabilities
from the_mask.modeling.propagation.policies import Gate, interval, scene_cut
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.propagation.propagators import Propagator
from the_mask.modeling.propagation.score_cache import ScoreCache, cache_from_config
from the_mask.modeling.propagation.training import distillation_loss, draw_distance, segmentation_loss, unroll
from the_mask.modeling.segmentor import Segmentor
from the_mask.modeling.stream import NO_HINTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"


class ColourSegmentor(Segmentor):
    """Classes red, green, blue: scores are colours, not normalised, at stride 2; counts the frames it saw."""

    def __init__(self):
        super().__init__(num_classes=3, ignore_label=255, pixel_mean=(0.0,) * 3, pixel_std=(255.0,) * 3)
        self.gain = torch.nn.Parameter(torch.tensor(2.0))
        self.frames = 0

    score_stride = 2

    def losses(self, clips):
        raise AssertionError("a frozen segmentor is not trained")

    def group_scores(self, images, num_frames):
        self.frames += len(images)
        return (self.gain * F.avg_pool2d(images, 2, ceil_mode=True) + 0.1).unflatten(0, (-1, num_frames))

    def init_state(self):
        return self.new_state()

    def step(self, frame, state, hints=NO_HINTS):
        scores = self.score_maps([Clip([frame])])[0]
        return self.crop_scores(scores[0], *frame.shape[-2:]), {**state, "seen": state["seen"] + 1}


def wrap(propagator=None, max_gap=3, segmentor=None, measure=None, gate=None, **options):
    name = type(measure).__name__ if measure else "interval"
    gate = gate or Gate(float("inf"), max_gap=max_gap)
    options = {"stride": 4, **options}
    cache = options.pop("cache", None)
    return PropagatedSegmentor(
        segmentor=segmentor or ColourSegmentor(),
        propagator=propagator or CopyPropagator(),
        policy=(name, measure or interval(), gate),
        frame_mean=(100.0,) * 3,
        frame_std=(50.0,) * 3,
        options=KeyframeOptions(**options),
        cache=cache,
    ).eval()


def frames(count, height=20, width=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 5, 7), generator=generator).float()
    return list(F.interpolate(coarse, size=(height, width)).to(torch.uint8))


def clips(count=2, length=4, height=20, width=28):
    result = []
    for number in range(count):
        labels = torch.randint(0, 3, (height, width), generator=torch.Generator().manual_seed(number))
        result.append(
            Clip(
                frames(length, height, width, seed=number),
                [None] * (length - 1) + [labels],
                dataset="toy",
                video_id=f"v{number}",
                frame_ids=[str(t) for t in range(length)],
                seed=number,
            )
        )
    return result


def stream(model, video, state=None):
    state = model.init_state() if state is None else state
    scores, states = [], []
    for frame in video:
        score, state = model.step(frame, state)
        scores.append(score)
        states.append(state)
    return scores, states


def build(name="gsvnet_debug", **changes):
    words = ["MODEL.DEVICE", "cpu"]
    for key, value in changes.items():
        words += [key, str(value)]
    torch.manual_seed(0)
    return build_model(load_config(CONFIGS / f"{name}.yaml", words))


def shake_norms(model):
    """Batch norms that do something: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                values.copy_(low + (high - low) * torch.rand(values.shape, generator=generator))


def released_resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def released_step(gsvnet, scores, small, previous):
    """GSVNet's step on the operations of its released code: sampling and kernels between corner-aligned grids."""
    height, width = small.shape[-2:]
    flow = gsvnet.flow(small, previous)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([columns + flow[:, 0] * 2 / (width - 1), rows + flow[:, 1] * 2 / (height - 1)], dim=-1)
    warped = F.grid_sample(scores, grid, padding_mode="zeros", align_corners=True)
    laplacian = torch.ones(1, 1, 3, 3)
    laplacian[0, 0, 1, 1] = -8
    edges = (F.conv2d(warped.argmax(dim=1, keepdim=True).float(), laplacian, padding=1) != 0).float()
    intra = gsvnet.grm.intra_net.intra_net(small)
    weights = gsvnet.grm.guide(torch.cat([intra, edges], dim=1)).relu()[:, :, None]
    copies = F.conv3d(warped[:, None], gsvnet.grm.ideal_dk.filter_copy_s, padding=(0, 1, 1))
    slots = torch.cat([warped[:, None], copies, intra[:, None]], dim=1)
    return (slots * weights / (weights.sum(dim=1, keepdim=True) + 1e-9)).sum(dim=1)


class TestStream:
    def test_interval_and_flags(self):
        model = wrap(max_gap=3)
        _, states = stream(model, frames(7))
        assert [s["keyframe"] for s in states] == [True, False, False, True, False, False, True]
        assert [s["reason"] for s in states] == ["first", "", "", "gap", "", "", "gap"]
        assert [s["since_key"] for s in states] == [0, 1, 2, 0, 1, 2, 0]
        assert model.segmentor.frames == 3

    @pytest.mark.parametrize("size", [(20, 28), (37, 53), (5, 3)])
    def test_interval_one_is_the_segmentor_through_the_grid(self, size):
        model = wrap(GSVNet(3), max_gap=1)
        video = frames(3, *size)
        scores, states = stream(model, video)
        assert all(s["keyframe"] for s in states)
        for frame, score in zip(video, scores):
            (alone,) = model.segmentor.score_maps([Clip([frame])])
            probabilities = alone[0] / alone[0].sum(dim=0)
            rows = slice(None, -(-size[0] // 4) * 2)
            # From stride 2 to 4: means of 2x2 cells, the border repeated.
            padded = F.pad(probabilities[None], (0, alone.shape[-1] % 2, 0, alone.shape[-2] % 2), mode="replicate")
            expected = F.avg_pool2d(padded[..., rows, :], 2)[0]
            assert_close(score, expected / expected.sum(dim=0), "network")

    def test_copy_repeats_the_keyframe(self):
        scores, _ = stream(wrap(max_gap=3), frames(4))
        torch.testing.assert_close(scores[1], scores[0])
        torch.testing.assert_close(scores[2], scores[0])
        assert not torch.equal(scores[3], scores[0])

    @pytest.mark.parametrize("make", [CopyPropagator, WarpPropagator, lambda: GSVNet(3, "official")])
    def test_many_streams_equal_one_by_one(self, make):
        """Also streams out of step, and of different sizes, in one batch."""
        torch.manual_seed(0)
        model = wrap(make(), max_gap=3)
        videos = [frames(6, seed=1), frames(6, seed=2), frames(6, 30, 22, seed=3)]
        alone = [stream(model, video[offset:])[0] for offset, video in enumerate(videos)]
        states = [model.init_state() for _ in videos]
        for t in range(6):
            active = [i for i in range(3) if t >= i]
            scores, new = model.step_many([videos[i][t] for i in active], [states[i] for i in active])
            for i, score, state in zip(active, scores, new):
                states[i] = state
                assert_close(score, alone[i][t - i], "network")

    def test_cutting_a_stream_in_two_changes_nothing(self):
        """The state goes to a file and back between any two frames."""
        torch.manual_seed(0)
        model = wrap(GSVNet(3, "agnostic"), max_gap=4)
        video = frames(7)
        whole, _ = stream(model, video)
        for cut in (1, 3, 4):
            _, states = stream(model, video[:cut])
            file = io.BytesIO()
            torch.save(states[-1], file)
            file.seek(0)
            rest, _ = stream(model, video[cut:], torch.load(file, weights_only=True))
            for ours, theirs in zip(rest, whole[cut:]):
                torch.testing.assert_close(ours, theirs)

    def test_state_is_not_changed_in_place(self):
        model = wrap(WarpPropagator(), max_gap=3)
        _, (state,) = stream(model, frames(1))
        before = copy.deepcopy(state)
        model.step(frames(2)[1], state)
        assert state.keys() == before.keys()
        torch.testing.assert_close(state["scores"], before["scores"])
        assert (state["seen"], state["policy"]) == (before["seen"], before["policy"])

    @pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
    def test_state_has_a_constant_size(self, count):
        model = wrap(max_gap=5, measure=scene_cut(), gate=Gate(27.0, rearm=0.5, min_gap=2, max_gap=5))
        sizes, state, video = set(), model.init_state(), frames(10)
        for t in range(count):
            _, state = model.step(video[t % 10], state)
            if t >= 10:
                sizes.add((sum(x.numel() for x in state.values() if torch.is_tensor(x)), len(state["policy"])))
        assert len(sizes) == 1
        assert state["seen"] == count

    def test_new_size_starts_anew_and_is_counted(self):
        model = wrap(max_gap=10)
        _, states = stream(model, [*frames(2), *frames(2, 24, 40)])
        assert [s["reason"] for s in states] == ["first", "", "first", ""]
        assert [s["resets"] for s in states] == [0, 0, 1, 1]
        assert states[-1]["size"] == [24, 40]

    def test_requested_keyframe(self):
        model = wrap(max_gap=10)
        _, states = stream(model, frames(2))
        _, state = model.step(frames(3)[2], model.request_keyframe(states[-1]))
        assert (state["keyframe"], state["reason"], state["requested"]) == (True, "requested", False)

    def test_scene_cut_makes_a_keyframe_before_propagating(self):
        calls = []

        class Watched(CopyPropagator):
            def forward(self, *args):
                calls.append(1)
                return super().forward(*args)

        dark, bright = torch.zeros(3, 20, 28, dtype=torch.uint8), torch.full((3, 20, 28), 250, dtype=torch.uint8)
        model = wrap(Watched(), measure=scene_cut(), gate=Gate(27.0))
        _, states = stream(model, [dark, dark, bright, bright, dark])
        assert [s["reason"] for s in states] == ["first", "", "scene_cut", "", "scene_cut"]
        assert len(calls) == 2

    @pytest.mark.parametrize("policy", ["warp_error", "intra_weight", "disagreement"])
    def test_policies_on_the_propagated_result(self, policy):
        model = build(**{"MODEL.KEYFRAME.POLICY": policy, "MODEL.KEYFRAME.THRESHOLD": 1e9, "MODEL.KEYFRAME.MAX_GAP": 0})
        model.eval()
        _, states = stream(model, frames(4, 32, 48))
        assert [s["reason"] for s in states] == ["first", "", "", ""]
        model.gate = Gate(0.0)
        _, states = stream(model, frames(3, 32, 48))
        assert [s["reason"] for s in states] == ["first", policy, policy]

    def test_halves_of_a_step(self):
        """key_step and propagate, with which an engine chooses itself, give what step gives."""
        torch.manual_seed(0)
        model = wrap(GSVNet(3), max_gap=3)
        video = frames(3)
        scores, _ = stream(model, video)
        (state,) = model.key_step(video[:1], [model.init_state()])
        for t in (1, 2):
            (state,) = model.propagate(model.small_frames(video[t : t + 1]), [state])
            assert not state["keyframe"]
            torch.testing.assert_close(model.output(state), scores[t])

    def test_scores_of_a_clip_are_those_of_a_stream(self):
        torch.manual_seed(0)
        model = wrap(GSVNet(3), max_gap=2)
        many = clips(3, length=4)
        for clip, scores in zip(many, model.score_maps(many)):
            assert_close(scores, torch.stack(stream(model, clip.frames)[0]), "network")
        labels = model.predict(many)
        assert [tuple(x.shape) for x in labels[0]] == [(20, 28)] * 4

    def test_key_scale_and_strides(self):
        for options in ({"key_scale": 0.5}, {"stride": 8}, {"stride": 1}):
            model = wrap(WarpPropagator(), max_gap=2, **options)
            video = [torch.full((3, 37, 53), 0, dtype=torch.uint8) for _ in range(2)]
            for frame in video:
                frame[1, :, 26:] = 255
                frame[0, :, :26] = 255
            scores, _ = stream(model, video)
            h, w = -(-37 // model.options.stride), -(-53 // model.options.stride)
            assert scores[0].shape == (3, h, w)
            classes = scores[0].argmax(dim=0)
            edge = max(1, 26 // model.options.stride)
            assert (classes[:, : edge - 1] == 0).all()
            assert (classes[:, edge + 1 :] == 1).all()

    def test_released_scores(self):
        """One switch gives what the released code computes, written here with its own operations."""
        keys = {"RELEASED": True, "VARIANT": "paper", "KEY_SCALE": 0.75, "STRIDE": 8}
        model = build(**{f"MODEL.KEYFRAME.{key}": value for key, value in keys.items()}).eval()
        shake_norms(model)
        assert model.propagator.grm.variant == "official"
        video = frames(3, 128, 256)
        grid = (16, 32)
        smalls = []
        with torch.no_grad():
            for frame in video:
                small = released_resize(frame[None].float(), grid)
                smalls.append(((small - model.frame_mean) / model.frame_std).flip(1))
            segmentor = model.segmentor
            images = (released_resize(video[0][None].float(), (96, 192)) - segmentor.pixel_mean) / segmentor.pixel_std
            expected = released_resize(segmentor.sem_seg_head(segmentor.backbone(images)).logits, grid)
            state = model.init_state()
            for t, frame in enumerate(video):
                if t:
                    expected = released_step(model.propagator, expected, smalls[t], smalls[t - 1])
                output, state = model.step(frame, state)
                assert state["keyframe"] == (t == 0)
                error = (state["scores"] - expected[0]).abs().max() / expected.abs().max()
                assert error < 1e-5
                assert output.shape == expected.shape[1:]

    def test_log_probabilities(self):
        values = log_probabilities(torch.tensor([0.0, 1e-9, 0.5, 1.0]))
        torch.testing.assert_close(values, torch.tensor([-10.0, -10.0, 0.5, 1.0]).where(values == -10, values))
        assert values.tolist()[2:] == pytest.approx([-0.6931472, 0.0])


class TestQueries:
    @pytest.mark.parametrize("name", ["the_mask_debug_1f", "the_mask_debug_video"])
    @pytest.mark.parametrize("propagator", ["copy", "gsvnet"])
    def test_masks_of_a_mask_classifier_travel(self, name, propagator):
        """One-frame and temporal THE-Mask as key segmentor; the masks give the segmentor's scores again."""
        model = build(
            name,
            **{
                "MODEL.META_ARCHITECTURE": "PropagatedSegmentor",
                "MODEL.KEYFRAME.SEGMENTOR": "MaskClassifier",
                "MODEL.KEYFRAME.PROPAGATOR": propagator,
                "MODEL.KEYFRAME.VARIANT": "agnostic",
                "MODEL.KEYFRAME.CARRY": "queries",
                "MODEL.KEYFRAME.STRIDE": 4,
                "MODEL.KEYFRAME.INTERVAL": 2,
            },
        ).eval()
        video = frames(4, 64, 64)
        scores, states = stream(model, video)
        assert [s["keyframe"] for s in states] == [True, False, True, False]
        queries, (h, w) = states[0]["queries"], scores[0].shape[-2:]
        assert queries.shape == (12 * (2 if "video" in name else 1), h, w)
        combined = torch.einsum("qk,qhw->khw", states[0]["query_classes"], queries.sigmoid())
        (alone,) = model.segmentor.score_maps([Clip(video[:1])])
        assert_close(combined, alone[0], "runtime")
        torch.testing.assert_close(states[1]["query_classes"], states[0]["query_classes"])
        same = torch.equal(states[1]["queries"], queries)
        assert same == (propagator == "copy")
        # A segmentor that looks back remembers keyframes only.
        if "video" in name:
            assert states[-1]["segmentor"]["seen"] == 2

    def test_propagators_without_masks(self):
        with pytest.raises(ValueError, match="CARRY queries needs a segmentor with queries"):
            wrap(carry="queries")


class TestTraining:
    def test_losses_reach_the_propagator_alone(self):
        torch.manual_seed(0)
        model = wrap(GSVNet(3), distances=(1, 2, 3), distill_weight=10.0).train()
        assert not model.segmentor.training
        losses = model(clips())
        assert set(losses) == {"loss_ce", "loss_distill"}
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.propagator.parameters())
        assert model.segmentor.gain.grad is None

    @pytest.mark.parametrize(("differentiated", "learning"), [(2, 2), (0, 4), (1, 1), (9, 4)])
    def test_only_the_last_steps_are_differentiated(self, differentiated, learning):
        """Gradient reaches the scores ``learning`` steps back, and no further."""
        modes = []

        class Linear(Propagator):
            def __init__(self):
                super().__init__()
                self.flow, self.other = torch.nn.Identity(), torch.nn.Identity()
                self.weight = torch.nn.Parameter(torch.tensor(1.0))

            def forward(self, scores, frame, previous, queries=None):
                modes.append((self.flow.training, self.other.training, torch.is_grad_enabled()))
                result = CopyPropagator()(scores, frame, previous)
                result.scores = scores * self.weight
                return result

        model = Linear().train()
        unroll(model, torch.ones(1, 2, 3, 3), [torch.zeros(1, 3, 3, 3)] * 5, differentiated).scores.sum().backward()
        assert float(model.weight.grad) == pytest.approx(18 * learning)
        assert modes == [(True, False, False)] * (4 - learning) + [(True, True, True)] * learning
        assert model.other.training

    def test_training_learns(self):
        """A propagator can only beat the copied keyframe by looking at the frame: labels follow the last frame."""
        torch.manual_seed(0)
        model = wrap(GSVNet(3), distances=(1, 2)).train()
        batch = []
        for number in range(4):
            video = frames(3, 16, 16, seed=number)
            batch.append(Clip(video, [None, None, video[-1].long().argmax(dim=0)], seed=number))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
        values = []
        for iteration in range(40):
            model.set_iteration(iteration)
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        assert sum(values[-5:]) < 0.75 * sum(values[:5])

    def test_distances_are_uniform_and_repeatable(self):
        drawn = [draw_distance((1, 2, 4), iteration) for iteration in range(3000)]
        assert drawn == [draw_distance((1, 2, 4), iteration) for iteration in range(3000)]
        assert {d: drawn.count(d) / 3000 for d in (1, 2, 4)} == pytest.approx({1: 1 / 3, 2: 1 / 3, 4: 1 / 3}, abs=0.03)

    def test_loss_values(self):
        logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
        labels[0, 0] = 255
        weights = torch.tensor([1.0, 2.0, 5.0])
        expected = F.cross_entropy(logits, labels, weights, ignore_index=255)
        torch.testing.assert_close(segmentation_loss(logits, labels, 255, weights), expected)
        assert segmentation_loss(logits, torch.full_like(labels, 255), 255, weights) == 0
        teacher = torch.randn(2, 3, 4, 5)
        p, q = teacher.softmax(1), logits.softmax(1)
        torch.testing.assert_close(distillation_loss(logits, teacher), (p * (p / q).log()).mean())
        assert float(distillation_loss(teacher + 3, teacher)) == pytest.approx(0, abs=1e-6)

    def test_cached_scores_train_the_same(self, tmp_path):
        torch.manual_seed(0)
        model = wrap(GSVNet(3), distances=(2,), distill_weight=1.0).train()
        model.propagator.eval()
        expected = model(clips())
        model.cache = ScoreCache(tmp_path / "cache")
        model.segmentor.frames = 0
        first = model(clips())
        assert model.segmentor.frames == 4
        again = model(clips())
        assert model.segmentor.frames == 4
        for name in expected:
            # Kept in half precision.
            assert_close(first[name], expected[name], "stored half")
            torch.testing.assert_close(again[name], first[name])
        files = sorted(path.relative_to(tmp_path / "cache").as_posix() for path in tmp_path.rglob("*.pt"))
        assert files == ["toy/v0/1.pt", "toy/v0/3.pt", "toy/v1/1.pt", "toy/v1/3.pt"]

    def test_cached_scores_of_a_changed_picture_are_made_anew(self, tmp_path):
        model = wrap(GSVNet(3), distances=(2,), cache=ScoreCache(tmp_path)).train()
        batch = clips()
        model(batch)
        model.segmentor.frames = 0
        before, changed, *after = batch[0].frames
        batch[0] = replace(batch[0], frames=[before, changed + 1, *after])
        model(batch)
        assert model.segmentor.frames == 1

    def test_cache_of_another_segmentor_is_refused(self, tmp_path):
        model = wrap(GSVNet(3), distances=(2,), cache=ScoreCache(tmp_path)).train()
        model(clips())
        other = wrap(GSVNet(3), distances=(2,), cache=ScoreCache(tmp_path)).train()
        other.segmentor.gain.data.fill_(7)
        with pytest.raises(ValueError, match="holds scores of another segmentor"):
            other(clips())
        model.cache = ScoreCache(tmp_path)
        (tmp_path / "toy" / "v0" / "1.pt").write_bytes(b"half a file")
        with pytest.raises(ValueError, match=r"v0.1\.pt .*is damaged"):
            model(clips())

    def test_cache_needs_frames_without_augmentation(self):
        with pytest.raises(ValueError, match=r"CACHE_DIR needs frames without augmentation: set INPUT\.RESIZE"):
            build(**{"MODEL.KEYFRAME.CACHE_DIR": "somewhere"})

    def test_cached_scores_do_not_depend_on_the_order_of_keys(self):
        keys = ["RESIZE.MIN_SCALE", "1.0", "RESIZE.MAX_SCALE", "1.0", "CROP.ENABLED", "False"]
        keys += ["RANDOM_FLIP", "none", "COLOR_JITTER", "none"]
        fixed = [word if index % 2 else f"INPUT.{word}" for index, word in enumerate(keys)]
        cfg = load_config(None, [*fixed, "MODEL.KEYFRAME.CACHE_DIR", "somewhere"])
        before = cache_from_config(cfg).geometry
        turned = dict(reversed(cfg.MODEL.items()))
        cfg.MODEL.clear()
        cfg.MODEL.update(turned)
        assert cache_from_config(cfg).geometry == before
        cfg.MODEL.THE_MASK.ROUNDS = 7
        assert cache_from_config(cfg).geometry != before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"length": 2}, r"clips of 2 frames are too short for MODEL\.KEYFRAME\.DISTANCES"),
            ({"labels": None}, "no labels on the last frame of clips .*v0"),
            ({"labels": 7}, r"labels \[7\] are outside 0\.\.2"),
        ],
    )
    def test_bad_clips(self, change, message):
        batch = clips(1, change.get("length", 4))
        if "labels" in change:
            last = None if change["labels"] is None else torch.full((20, 28), change["labels"])
            batch[0] = replace(batch[0], labels=[*batch[0].labels[:-1], last])
        with pytest.raises(ValueError, match=message):
            wrap(GSVNet(3), distances=(1, 3)).train()(batch)


class TestBadInput:
    def test_states_and_frames(self):
        model = wrap()
        frame = frames(1)[0]
        with pytest.raises(ValueError, match="not a state of PropagatedSegmentor"):
            model.step(frame, {"seen": 0})
        with pytest.raises(ValueError, match=r"a frame is RGB \[3, H, W\], got shape \[1, 20, 28\]"):
            model.step(frame[:1], model.init_state())
        with pytest.raises(ValueError, match="start with a keyframe"):
            model.propagate(model.small_frames([frame]), [model.init_state()])

    def test_scores_that_are_not_finite(self):
        segmentor = ColourSegmentor()
        segmentor.gain.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            stream(wrap(segmentor=segmentor), frames(1))
        model = wrap(WarpPropagator())
        model.propagator.flow.toflow.bias.data.fill_(float("nan"))
        (state,) = model.key_step(frames(1), [model.init_state()])
        state["scores"][:] = float("nan")
        with pytest.raises(ValueError, match="frame 1 of a stream are not finite"):
            model.step(frames(2)[1], state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stride": 0}, "STRIDE 0"),
            ({"key_scale": 0}, "KEY_SCALE is 0"),
            ({"carry": "masks"}, "CARRY 'masks'"),
            ({"distances": ()}, "DISTANCES"),
            ({"distances": (0, 1)}, "DISTANCES"),
            ({"unroll": -1}, "UNROLL -1"),
            ({"class_weights": (1.0,)}, "CLASS_WEIGHTS has 1 values for 3 classes"),
            ({"released": True}, "RELEASED needs the raw logits of a ClipSegmentor"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            wrap(**options)

    def test_configs(self):
        with pytest.raises(ValueError, match=r"KEYFRAME\.SEGMENTOR 'Nothing': expected one of"):
            build(**{"MODEL.KEYFRAME.SEGMENTOR": "Nothing"})
        with pytest.raises(ValueError, match=r"KEYFRAME\.SEGMENTOR 'PropagatedSegmentor'"):
            build(**{"MODEL.KEYFRAME.SEGMENTOR": "PropagatedSegmentor"})
        with pytest.raises(ValueError, match=r"KEYFRAME\.PROPAGATOR 'teleport': expected one of copy, gsvnet, warp"):
            build(**{"MODEL.KEYFRAME.PROPAGATOR": "teleport"})
        with pytest.raises(ValueError, match="VARIANT is official, not agnostic"):
            build(**{"MODEL.KEYFRAME.RELEASED": True, "MODEL.KEYFRAME.VARIANT": "agnostic"})
        assert "PropagatedSegmentor" in META_ARCH_REGISTRY
